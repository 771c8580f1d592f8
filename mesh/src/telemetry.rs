//! What a service shows of itself: one JSON line per event on standard error, and Prometheus metrics.

mod json;
mod lines;

use std::{io, sync::OnceLock, time::Duration};

use metrics_exporter_prometheus::{Matcher, PrometheusBuilder, PrometheusHandle};
use tracing_subscriber::EnvFilter;

use self::{json::Json, lines::Lines};

/// Bounds of latency histograms, seconds: from a relay hop to a cold boot.
const LATENCY_BUCKETS: &[f64] =
    &[0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0];

/// How often histograms are folded, so that a service that nobody scrapes does not grow.
const UPKEEP: Duration = Duration::from_secs(15);

static METRICS: OnceLock<PrometheusHandle> = OnceLock::new();

/// Writes what has been logged last when it is dropped.
#[must_use = "what is logged last is lost otherwise"]
#[derive(Debug)]
pub struct Logs(Option<Lines>);

impl Drop for Logs {
    fn drop(&mut self) {
        if let Some(lines) = &self.0 {
            lines.end();
        }
    }
}

/// Starts logging and metrics for this process. `OC_LOG` (else `RUST_LOG`) filters, in the syntax of
/// `tracing_subscriber::EnvFilter`; `info` where absent. Must run inside the runtime; later calls do nothing.
pub fn init(service: &'static str) -> Logs {
    let filter = EnvFilter::try_from_env("OC_LOG")
        .or_else(|_| EnvFilter::try_from_default_env())
        .unwrap_or_else(|_| EnvFilter::new("info"));
    let lines = Lines::to(io::stderr());
    let writer = lines.clone();
    let started = tracing_subscriber::fmt()
        .json()
        .event_format(Json)
        .with_env_filter(filter)
        .with_writer(move || writer.clone())
        .try_init()
        .is_ok();
    if !started {
        return Logs(None);
    }
    lines.start();
    let logs = Logs(Some(lines));
    if METRICS.get().is_some() {
        return logs;
    }
    let installed = PrometheusBuilder::new()
        .set_buckets_for_metric(Matcher::Suffix("_seconds".into()), LATENCY_BUCKETS)
        .and_then(|builder| builder.add_global_label("service", service).install_recorder());
    match installed {
        Ok(handle) => {
            let upkeep = handle.clone();
            // Lives as long as the process: there is nothing to wait for.
            tokio::spawn(async move {
                let mut tick = tokio::time::interval(UPKEEP);
                loop {
                    tick.tick().await;
                    upkeep.run_upkeep();
                }
            });
            let _ = METRICS.set(handle);
        }
        Err(error) => tracing::error!(%error, "metrics are off"),
    }
    logs
}

/// All metrics of this process in Prometheus' text format; empty before [`init`].
pub fn render_metrics() -> String {
    METRICS.get().map(PrometheusHandle::render).unwrap_or_default()
}
