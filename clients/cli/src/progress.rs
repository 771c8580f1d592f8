//! Progress of what takes longer than half a second, on standard error, and only if that is a terminal.

use std::{
    borrow::Cow,
    cell::Cell,
    io::{self, IsTerminal as _},
    time::Duration,
};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use tokio::time::{self, Instant};

/// What is over sooner shows nothing.
const PATIENCE: Duration = Duration::from_millis(500);
const TICK: Duration = Duration::from_millis(100);

/// Waits for `work` with a spinner that says `what`.
pub async fn during<T>(what: impl Into<Cow<'static, str>>, work: impl Future<Output = T>) -> T {
    let mut work = std::pin::pin!(work);
    if !io::stderr().is_terminal() {
        return work.await;
    }
    if let Ok(result) = time::timeout(PATIENCE, &mut work).await {
        return result;
    }
    let spinner = spinner();
    spinner.set_message(what);
    let result = work.await;
    spinner.finish_and_clear();
    result
}

/// A spinner that turns by itself.
pub fn spinner() -> ProgressBar {
    let spinner = ProgressBar::new_spinner();
    if let Ok(style) = ProgressStyle::with_template("{spinner} {msg} ({elapsed})") {
        spinner.set_style(style);
    }
    spinner.enable_steady_tick(TICK);
    spinner
}

/// How far a transfer is.
#[derive(Debug)]
pub struct Meter {
    bar: ProgressBar,
    since: Instant,
    shown: Cell<bool>,
}

impl Meter {
    /// A transfer of `name`; of `size` bytes, if that is known.
    pub fn new(name: String, size: Option<u64>) -> Self {
        let bar = ProgressBar::with_draw_target(size, ProgressDrawTarget::hidden());
        bar.set_style(style(size.is_some()));
        bar.set_message(name);
        Self { bar, since: Instant::now(), shown: Cell::new(!io::stderr().is_terminal()) }
    }

    /// `bytes` more have passed.
    pub fn add(&self, bytes: usize) {
        self.bar.inc(bytes as u64);
        if !self.shown.get() && self.since.elapsed() > PATIENCE {
            self.shown.set(true);
            self.bar.set_draw_target(ProgressDrawTarget::stderr());
        }
    }

    /// The size has become known, or turned out not to be.
    pub fn expect(&self, size: Option<u64>) {
        if let Some(size) = size {
            self.bar.set_length(size);
            self.bar.set_style(style(true));
        }
    }
}

fn style(sized: bool) -> ProgressStyle {
    let template = if sized {
        "{msg} [{bar:30}] {bytes}/{total_bytes} {bytes_per_sec} {eta}"
    } else {
        "{spinner} {msg} {bytes} {bytes_per_sec}"
    };
    ProgressStyle::with_template(template)
        .unwrap_or_else(|_| ProgressStyle::default_bar())
        .progress_chars("=> ")
}

impl Drop for Meter {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}
