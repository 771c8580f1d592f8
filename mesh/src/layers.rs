//! Behaviour that every internal server and client has, as small tower layers, composed here once.
//!
//! | layer | server | client |
//! | --- | --- | --- |
//! | [`trace`] | accepts or starts a W3C trace context, opens the span | passes the context on |
//! | [`metrics`] | counts calls and their latency by method and code | the same |
//! | [`concurrency`] | sheds what exceeds the limit | |
//! | [`deadline`] | ends a call at the caller's deadline, or at our own | turns its expiry into `DEADLINE_EXCEEDED` |
//!
//! Listed from the outside in.

use tower::{Layer as _, ServiceBuilder};

pub mod concurrency;
pub mod deadline;
pub mod metrics;
pub mod observed;
pub mod trace;

use concurrency::ConcurrencyLayer;
use deadline::{DeadlineLayer, ServerDeadline};
use metrics::MetricsLayer;
use trace::TraceLayer;

/// What [`client_stack`] makes of a channel.
pub type ClientStack<S> = trace::Trace<metrics::Metrics<deadline::Deadline<S>>>;

/// The layers of a client.
pub fn client_stack<S>(channel: S) -> ClientStack<S> {
    TraceLayer::client().layer(MetricsLayer::client().layer(DeadlineLayer::client().layer(channel)))
}

/// The layers of a server.
pub type ServerStack = tower::layer::util::Stack<
    DeadlineLayer,
    tower::layer::util::Stack<
        ConcurrencyLayer,
        tower::layer::util::Stack<
            MetricsLayer,
            tower::layer::util::Stack<TraceLayer, tower::layer::util::Identity>,
        >,
    >,
>;

/// The layers of a server that takes `max_concurrent` calls at once and answers each within `max_deadline`.
pub fn server_stack(max_concurrent: usize, max_deadline: std::time::Duration) -> ServerStack {
    ServiceBuilder::new()
        .layer(TraceLayer::server())
        .layer(MetricsLayer::server())
        .layer(ConcurrencyLayer::new(max_concurrent))
        .layer(DeadlineLayer::server(ServerDeadline { max: max_deadline }))
        .into_inner()
}
