//! What a service shows of itself: one JSON line per event on standard error, and Prometheus metrics.

use std::{sync::OnceLock, time::Duration};

use metrics_exporter_prometheus::{Matcher, PrometheusBuilder, PrometheusHandle};
use tracing_subscriber::EnvFilter;

/// Bounds of latency histograms, seconds: from a relay hop to a cold boot.
const LATENCY_BUCKETS: &[f64] =
    &[0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0];

/// How often histograms are folded, so that a service that nobody scrapes does not grow.
const UPKEEP: Duration = Duration::from_secs(15);

static METRICS: OnceLock<PrometheusHandle> = OnceLock::new();

/// Starts logging and metrics for this process. `OC_LOG` (else `RUST_LOG`) filters, in the syntax of
/// `tracing_subscriber::EnvFilter`; `info` where absent. Must run inside the runtime; later calls do nothing.
pub fn init(service: &'static str) {
    let filter = EnvFilter::try_from_env("OC_LOG")
        .or_else(|_| EnvFilter::try_from_default_env())
        .unwrap_or_else(|_| EnvFilter::new("info"));
    let started = tracing_subscriber::fmt()
        .json()
        .flatten_event(true)
        .with_current_span(true)
        .with_span_list(false)
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .try_init()
        .is_ok();
    if !started || METRICS.get().is_some() {
        return;
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
}

/// All metrics of this process in Prometheus' text format; empty before [`init`].
pub fn render_metrics() -> String {
    METRICS.get().map(PrometheusHandle::render).unwrap_or_default()
}
