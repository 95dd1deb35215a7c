//! A page of counters and gauges in the text format of Prometheus (version 0.0.4), over HTTP.

use std::fmt::Write;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;

use edgellm_eval::rss_bytes;
use edgellm_model::ModelError;
use tiny_http::{Header, Method, Response, Server};

use super::{Pass, Telemetry, Totals};

/// Serves the page until the process ends.
pub struct MetricsServer {
    address: SocketAddr,
}

impl MetricsServer {
    /// Reads an address: `9090` is a port of this machine alone, `0.0.0.0:9090` one that all may reach.
    ///
    /// # Errors
    /// It is neither a port nor an address with a port.
    pub fn address_of(text: &str) -> Result<SocketAddr, String> {
        let loopback = |port| SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), port);
        let expected = || format!("expected a port, or an address such as 127.0.0.1:9090, found '{text}'");
        text.parse().map(loopback).or_else(|_| text.parse()).map_err(|_: std::net::AddrParseError| expected())
    }

    /// Listens, and answers from a thread of its own.
    ///
    /// # Errors
    /// The address is in use or not of this machine.
    pub fn start(address: SocketAddr, telemetry: Telemetry) -> Result<Self, ModelError> {
        let refused = |error: String| ModelError::Value {
            what: format!("address {address} for metrics"),
            expected: "one that is free, of this machine".into(),
            found: error,
        };
        let server = Server::http(address).map_err(|e| refused(e.to_string()))?;
        let bound = server.server_addr().to_ip().unwrap_or(address);
        let server = Arc::new(server);
        let answer = move || {
            for request in server.incoming_requests() {
                let response = match (request.method(), request.url()) {
                    (Method::Get, "/metrics" | "/") => Response::from_string(page(&telemetry.totals())),
                    (Method::Get, _) => Response::from_string("expected /metrics\n").with_status_code(404),
                    _ => Response::from_string("expected GET\n").with_status_code(405),
                };
                let kind = "Content-Type: text/plain; version=0.0.4; charset=utf-8".parse::<Header>();
                let response = kind.into_iter().fold(response, Response::with_header);
                // Who asked may be gone.
                let _ = request.respond(response);
            }
        };
        std::thread::Builder::new()
            .name("metrics".into())
            .spawn(answer)
            .map_err(|e| refused(format!("no thread: {e}")))?;
        Ok(Self { address: bound })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }
}

/// The page.
fn page(totals: &Totals) -> String {
    let mut out = String::new();
    let mut family = |name: &str, kind: &str, help: &str, samples: &mut dyn Iterator<Item = (String, f64)>| {
        let _ = writeln!(out, "# HELP {name} {help}\n# TYPE {name} {kind}");
        for (labels, value) in samples {
            let _ = writeln!(out, "{name}{labels} {value}");
        }
    };
    let passes = || Pass::ALL.into_iter().map(|pass| (pass.name(), totals.pass(pass)));
    let layers = || passes().flat_map(|(pass, sums)| sums.layers.iter().enumerate().map(move |(i, l)| (pass, i, l)));
    let by_pass = |pass: &str| format!("{{pass=\"{pass}\"}}");
    let by_layer = |pass: &str, layer: usize| format!("{{pass=\"{pass}\",layer=\"{layer}\"}}");
    family(
        "edgellm_tokens_total",
        "counter",
        "Tokens that were run.",
        &mut passes().map(|(p, s)| (by_pass(p), s.tokens as f64)),
    );
    family(
        "edgellm_pass_seconds_total",
        "counter",
        "Wall time of passes through the model.",
        &mut passes().map(|(p, s)| (by_pass(p), seconds(s.ns as f64))),
    );
    family(
        "edgellm_layer_seconds_total",
        "counter",
        "Wall time by layer.",
        &mut layers().map(|(p, i, l)| (by_layer(p, i), seconds(l.ns as f64))),
    );
    family(
        "edgellm_layer_read_bytes_total",
        "counter",
        "Bytes of packed weights that were read.",
        &mut layers().map(|(p, i, l)| (by_layer(p, i), l.bytes as f64)),
    );
    let operators = passes().flat_map(|(pass, sums)| {
        let mut all = sums.operators();
        for layer in &sums.layers {
            layer.operators().into_iter().for_each(|(name, ns)| *all.entry(name).or_default() += ns);
        }
        all.into_iter().map(move |(name, ns)| (format!("{{pass=\"{pass}\",operator=\"{name}\"}}"), seconds(ns)))
    });
    family(
        "edgellm_operator_seconds_total",
        "counter",
        "Wall time by operator, measured in some tokens and scaled to all.",
        &mut { operators },
    );
    let stages = totals.stages.iter().map(|(name, ns)| (format!("{{stage=\"{name}\"}}"), seconds(ns as f64)));
    family("edgellm_stage_seconds_total", "counter", "Wall time of other stages.", &mut { stages });
    let decode = totals.pass(Pass::Decode);
    let rate = (decode.ns > 0).then(|| (String::new(), decode.tokens as f64 / seconds(decode.ns as f64)));
    family("edgellm_decode_tokens_per_second", "gauge", "Mean rate of decoding.", &mut rate.into_iter());
    let rss = rss_bytes().map(|bytes| (String::new(), bytes as f64));
    family("process_resident_memory_bytes", "gauge", "Physical memory in use.", &mut rss.into_iter());
    out
}

fn seconds(ns: f64) -> f64 {
    ns * 1e-9
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::telemetry::Named;

    #[test]
    fn a_port_alone_is_of_this_machine() {
        assert!(MetricsServer::address_of("9090").unwrap().ip().is_loopback());
        assert_eq!(MetricsServer::address_of("0.0.0.0:1").unwrap().to_string(), "0.0.0.0:1");
        assert!(MetricsServer::address_of("everywhere").unwrap_err().contains("found 'everywhere'"));
    }

    #[test]
    fn a_page_has_a_sample_a_line() {
        let mut totals = Totals::default();
        totals.add_block(Pass::Decode, 0, 2_000_000_000, 5, true, &Named::default());
        totals.add_pass(Pass::Decode, 4, 2_000_000_000, true);
        let page = page(&totals);
        assert!(page.contains("edgellm_layer_seconds_total{pass=\"decode\",layer=\"0\"} 2\n"), "{page}");
        assert!(page.contains("\nedgellm_decode_tokens_per_second 2\n"), "{page}");
        for line in page.lines().filter(|line| !line.starts_with('#')) {
            let (_, value) = line.rsplit_once(' ').unwrap();
            assert!(value.parse::<f64>().unwrap().is_finite(), "{line}");
        }
    }
}
