//! A page on this machine's own address, for a person who looks at a run.
//!
//! It listens on the loopback address only, answers to nobody who names another host (a page from elsewhere that was made to
//! resolve to this address), and only to GET.

use std::time::Duration;

use tiny_http::{Header, Method, Request, Response, Server};

use crate::cli::{Context, interrupt, output};

/// How often a signal is looked for.
const PATIENCE: Duration = Duration::from_millis(200);

/// Serves what `page` makes, until a signal.
pub(super) fn serve(ctx: &Context, port: u16, page: &dyn Fn() -> anyhow::Result<String>) -> anyhow::Result<()> {
    // Whether there is anything to show.
    page()?;
    let server = Server::http(("127.0.0.1", port))
        .map_err(|e| anyhow::anyhow!("--live {port}: the port cannot be opened: {e}"))?;
    let address = server.server_addr().to_ip().ok_or_else(|| anyhow::anyhow!("--live: no address"))?;
    output::print(&format!("http://{address}/\n"))?;
    ctx.say("Ctrl-C ends it");
    while !interrupt::requested() {
        let Some(request) = server.recv_timeout(PATIENCE)? else { continue };
        let response = answer(&request, address.port(), page);
        // A reader that went away is nothing to us.
        let _ = request.respond(response);
    }
    Ok(())
}

fn answer(
    request: &Request,
    port: u16,
    page: &dyn Fn() -> anyhow::Result<String>,
) -> Response<std::io::Cursor<Vec<u8>>> {
    let host = request.headers().iter().find(|header| header.field.equiv("Host")).map(|header| header.value.as_str());
    let ours = [format!("127.0.0.1:{port}"), format!("localhost:{port}")];
    if !host.is_some_and(|host| ours.iter().any(|name| name == host)) {
        return Response::from_string("this page answers to 127.0.0.1 only\n").with_status_code(403);
    }
    if *request.method() != Method::Get {
        return Response::from_string("expected GET\n").with_status_code(405);
    }
    if request.url() != "/" {
        return Response::from_string("there is only /\n").with_status_code(404);
    }
    match page() {
        Ok(html) => {
            let html_type = Header::from_bytes("Content-Type", "text/html; charset=utf-8");
            let fresh = Header::from_bytes("Cache-Control", "no-store");
            let headers = html_type.into_iter().chain(fresh);
            headers.fold(Response::from_string(html), Response::with_header)
        }
        Err(error) => Response::from_string(format!("{error:#}\n")).with_status_code(500),
    }
}
