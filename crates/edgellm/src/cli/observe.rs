//! `--metrics`, `--trace` and `--metrics-address`: analytics of any command.

use std::path::PathBuf;

use clap::Args;
use edgellm::model::decoder::Decoder;
use edgellm::model::traits::{MetricSink, NoMetrics};
use edgellm::telemetry::{Destinations, Telemetry, TelemetryLayer};

use super::check_output_file;

/// What is told of a command's work.
#[derive(Args)]
pub(super) struct Observe {
    /// A file for metrics: JSON lines, one event a line, such as the time of layers and operators, once a second
    #[arg(long, global = true, value_name = "FILE.jsonl")]
    metrics: Option<PathBuf>,
    /// A file for a trace of stages, layers and operators, which Perfetto and Chromium open (at most 64 MiB)
    #[arg(long, global = true, value_name = "FILE.json")]
    trace: Option<PathBuf>,
    /// Serve metrics to Prometheus while the command runs: a port of this machine alone, or ADDRESS:PORT
    #[cfg(feature = "prometheus")]
    #[arg(long, global = true, value_name = "ADDRESS", value_parser = edgellm::telemetry::MetricsServer::address_of)]
    metrics_address: Option<std::net::SocketAddr>,
}

impl Observe {
    /// Opens what was asked for.
    pub(super) fn open(&self) -> anyhow::Result<Observed> {
        for path in [&self.metrics, &self.trace].into_iter().flatten() {
            check_output_file(path)?;
        }
        if self.metrics.is_some() && self.metrics == self.trace {
            return Err(super::Usage("--metrics and --trace: expected two files, found one".into()).into());
        }
        let destinations = Destinations { metrics: self.metrics.clone(), trace: self.trace.clone() };
        let wanted = self.metrics.is_some() || self.trace.is_some();
        #[cfg(feature = "prometheus")]
        let wanted = wanted || self.metrics_address.is_some();
        if !wanted {
            return Ok(Observed(None));
        }
        let telemetry = Telemetry::open(&destinations)?;
        #[cfg(feature = "prometheus")]
        if let Some(address) = self.metrics_address {
            let server = edgellm::telemetry::MetricsServer::start(address, telemetry.clone())?;
            super::say(&format!("metrics: http://{}/metrics", server.address()));
        }
        Ok(Observed(Some(telemetry)))
    }
}

/// What collects the analytics, if they were asked for.
#[derive(Clone)]
pub(super) struct Observed(Option<Telemetry>);

impl Observed {
    pub(super) fn is_on(&self) -> bool {
        self.0.is_some()
    }

    pub(super) fn layer(&self) -> Option<TelemetryLayer> {
        self.0.as_ref().map(Telemetry::layer)
    }

    pub(super) fn sink(&self) -> Box<dyn MetricSink> {
        self.0.as_ref().map_or_else(|| Box::new(NoMetrics) as Box<dyn MetricSink>, Telemetry::sink)
    }

    pub(super) fn describe(&self, decoder: &Decoder) {
        if let Some(telemetry) = &self.0 {
            telemetry.describe(decoder);
        }
    }

    pub(super) fn finish(&self) -> anyhow::Result<()> {
        Ok(self.0.as_ref().map_or(Ok(()), Telemetry::finish)?)
    }
}
