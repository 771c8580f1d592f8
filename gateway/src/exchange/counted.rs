//! What is counted of requests.
//!
//! A metric is found by its name and labels, which costs more than to count. So each thread keeps those that it has found: routes and
//! statuses are few.

use std::{cell::RefCell, collections::HashMap, time::Duration};

use metrics::{Counter, Gauge, Histogram};

thread_local! {
    static FOUND: RefCell<Found> = RefCell::new(Found {
        in_flight: metrics::gauge!("oc_gateway_requests_in_flight"),
        answer_bytes: metrics::counter!("oc_gateway_answer_bytes_total"),
        routes: HashMap::new(),
    });
}

struct Found {
    in_flight: Gauge,
    answer_bytes: Counter,
    routes: HashMap<String, Route>,
}

struct Route {
    seconds: Histogram,
    /// By method and status.
    requests: HashMap<(&'static str, u16), Counter>,
}

/// A thread that is ending counts nothing more.
fn with(count: impl FnOnce(&mut Found)) {
    let _ = FOUND.try_with(|found| count(&mut found.borrow_mut()));
}

/// A request has begun.
pub fn begin() {
    with(|found| found.in_flight.increment(1));
}

/// A request has ended. `method` and `route` are labels: there must be few of them.
pub fn end(method: &'static str, route: &str, status: u16, took: Duration, bytes: u64) {
    with(|found| {
        found.in_flight.decrement(1);
        found.answer_bytes.increment(bytes);
        if !found.routes.contains_key(route) {
            let seconds = metrics::histogram!("oc_gateway_request_seconds", "route" => route.to_owned());
            found.routes.insert(route.to_owned(), Route { seconds, requests: HashMap::new() });
        }
        let Some(known) = found.routes.get_mut(route) else { return };
        known.seconds.record(took.as_secs_f64());
        let requests = known.requests.entry((method, status)).or_insert_with(|| {
            let (route, status) = (route.to_owned(), status.to_string());
            metrics::counter!("oc_gateway_requests_total", "method" => method, "route" => route, "status" => status)
        });
        requests.increment(1);
    });
}
