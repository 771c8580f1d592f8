//! An event as one line of JSON: `timestamp`, `level`, the event's fields, `target`, and `span` with the fields and the `name` of the span
//! that it is in.
//!
//! The lines are those of `tracing_subscriber`'s own formatter, with which the log takes twice as long: a tenth of what a small request
//! through a preview takes.

use std::fmt::{self, Debug};

use serde::Serialize;
use tracing::{
    Event, Subscriber,
    field::{Field, Visit},
};
use tracing_log::NormalizeEvent as _;
use tracing_subscriber::{
    fmt::{
        FmtContext, FormatEvent, FormattedFields,
        format::{JsonFields, Writer},
        time::{FormatTime as _, SystemTime},
    },
    registry::LookupSpan,
};

/// Room for most lines.
const ROOM: usize = 512;

/// Formats events.
#[derive(Debug)]
pub struct Json;

impl<S> FormatEvent<S, JsonFields> for Json
where
    S: Subscriber + for<'a> LookupSpan<'a>,
{
    fn format_event(
        &self,
        context: &FmtContext<'_, S, JsonFields>,
        mut writer: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        // Events of the `log` crate say in fields what others have as their own.
        let normalized = event.normalized_metadata();
        let metadata = normalized.as_ref().unwrap_or_else(|| event.metadata());
        let mut line = Line(Vec::with_capacity(ROOM));
        line.push("{\"timestamp\":\"");
        SystemTime.format_time(&mut Writer::new(&mut line))?;
        line.push("\",\"level\":\"");
        line.push(metadata.level().as_str());
        line.push("\"");
        event.record(&mut line);
        line.push(",\"target\":");
        line.value(metadata.target());
        let parent = event.parent().and_then(|id| context.span(id));
        if let Some(span) = parent.or_else(|| context.lookup_current()) {
            let extensions = span.extensions();
            // An object, whole.
            let fields =
                extensions.get::<FormattedFields<JsonFields>>().map_or("{}", |fields| fields.as_str());
            line.push(",\"span\":");
            line.push(fields.strip_suffix('}').unwrap_or(fields));
            line.push(if fields == "{}" { "\"name\":" } else { ",\"name\":" });
            line.value(span.name());
            line.push("}");
        }
        line.push("}\n");
        writer.write_str(str::from_utf8(&line.0).map_err(|_| fmt::Error)?)
    }
}

/// A line that grows.
struct Line(Vec<u8>);

impl Line {
    fn push(&mut self, text: &str) {
        self.0.extend_from_slice(text.as_bytes());
    }

    fn value(&mut self, value: impl Serialize) {
        // It is of memory, and takes everything that has a form in JSON; what has none is null.
        let _ = serde_json::to_writer(&mut self.0, &value);
    }

    fn field(&mut self, field: &Field, value: impl Serialize) {
        self.push(",");
        self.value(field.name());
        self.push(":");
        self.value(value);
    }
}

impl fmt::Write for Line {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        self.push(text);
        Ok(())
    }
}

impl Visit for Line {
    fn record_f64(&mut self, field: &Field, value: f64) {
        self.field(field, value);
    }

    fn record_i64(&mut self, field: &Field, value: i64) {
        self.field(field, value);
    }

    fn record_u64(&mut self, field: &Field, value: u64) {
        self.field(field, value);
    }

    fn record_bool(&mut self, field: &Field, value: bool) {
        self.field(field, value);
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        self.field(field, value);
    }

    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        self.field(field, format_args!("{value:?}"));
    }
}

#[cfg(test)]
mod tests {
    use std::{io, sync::Arc};

    use parking_lot::Mutex;
    use serde_json::{Value, json};
    use tracing_log::{
        format_trace,
        log::{Level, Record},
    };

    use super::*;

    #[derive(Clone, Default)]
    struct Written(Arc<Mutex<Vec<u8>>>);

    impl io::Write for Written {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    /// What is logged, once by this formatter and once by the one whose lines these are.
    fn both(log: fn()) -> [Vec<Value>; 2] {
        let (ours, theirs) = (Written::default(), Written::default());
        let (here, there) = (ours.clone(), theirs.clone());
        let builder = || tracing_subscriber::fmt().json().flatten_event(true).with_span_list(false);
        let subscriber = builder().event_format(Json).with_writer(move || here.clone()).finish();
        tracing::subscriber::with_default(subscriber, log);
        tracing::subscriber::with_default(builder().with_writer(move || there.clone()).finish(), log);
        [ours, theirs].map(|written| {
            let text = String::from_utf8(written.0.lock().clone()).unwrap();
            let parse = |line: &str| {
                let mut line: Value = serde_json::from_str(line).unwrap();
                let at = line["timestamp"].take();
                assert_eq!(at.as_str().unwrap().len(), "2026-01-01T00:00:00.000000Z".len());
                line
            };
            text.lines().map(parse).collect()
        })
    }

    #[test]
    fn lines_are_those_of_the_usual_formatter() {
        let [ours, theirs] = both(|| {
            tracing::info!(count = 3, below = -3, share = 0.25, whole = 2.0, is_so = true, "plain");
            let error = io::Error::other("a \"quoted\" thing\nand more");
            tracing::error!(%error, path = ?std::path::Path::new("a\\b"), text = "tab\tand ü", none = None::<u64>);
            tracing::warn!(nan = f64::NAN, huge = 1e300, error = &error as &dyn std::error::Error, "odd");
            let by_log = format_args!("by log");
            format_trace(&Record::builder().level(Level::Warn).target("elsewhere").args(by_log).build())
                .unwrap();
            tracing::info_span!("outer", a = 1).in_scope(|| {
                tracing::info_span!("inner", id = "x}", more = tracing::field::Empty).in_scope(|| {
                    tracing::info!("within");
                    tracing::Span::current().record("more", "}}");
                    tracing::info!("within, with more");
                });
                tracing::info_span!("bare").in_scope(|| tracing::info!("in a bare one"));
            });
        });
        assert_eq!(ours.len(), 7);
        assert_eq!(ours, theirs);
        assert_eq!(ours[0]["whole"], json!(2.0));
    }
}
