//! Rows of measured figures.

use std::{
    fmt,
    time::{Duration, Instant},
};

pub use oc_integration::figures::{median, quantile};

use crate::floor::{Floor, fork::CHANGED_MIB};

/// The unit of a ratio.
pub const RATIO: &str = "×";

/// What was measured so far.
#[derive(Debug)]
pub struct Table {
    /// What the VMM alone takes.
    pub floor: Floor,
    facts: Vec<(String, String)>,
    rows: Vec<Row>,
}

#[derive(Debug)]
struct Row {
    what: String,
    measured: String,
    target: String,
    met: Option<bool>,
}

/// What a figure must be.
#[derive(Clone, Copy, Debug)]
pub enum Target {
    /// At most this.
    Most(f64),
    /// At least this.
    Least(f64),
    /// At most so many times another figure: factor, figure.
    MostTimes(f64, f64),
    /// At most so many times another figure that is not the floor's: factor, figure, which.
    MostTimesOf(f64, f64, &'static str),
    /// At least so many times another figure: factor, figure.
    LeastTimes(f64, f64),
    /// At least so many times another figure that is not the floor's: factor, figure, which.
    LeastTimesOf(f64, f64, &'static str),
    /// Nothing in particular.
    None,
}

impl Table {
    /// An empty table, with the floor as its first rows.
    pub fn new(floor: &Floor) -> Self {
        let mut table = Self { floor: floor.clone(), facts: Vec::new(), rows: Vec::new() };
        table.fact("vmm", &floor.version);
        table.row("floor: cold boot to a Python process", floor.cold_boot_ms, "ms", Target::None);
        table.row("floor: start of a clone to its first answer", floor.first_answer_ms, "ms", Target::None);
        table.row(
            "floor: guest to host over virtio-serial",
            floor.guest_to_host_mib_s,
            "MiB/s",
            Target::None,
        );
        table.row("floor: memory of an idle clone (Pss)", floor.clone_pss_mib, "MiB", Target::None);
        table.row("floor: live fork at rest, pause", floor.fork.pause_ms, "ms", Target::None);
        let changed = format!("floor: live fork with {CHANGED_MIB} MiB changed, pause");
        table.row(&changed, floor.fork.pause_changed_ms, "ms", Target::None);
        let answer = "floor: start of a live fork's child to its first answer";
        table.row(answer, floor.fork.first_answer_ms, "ms", Target::None);
        table
    }

    /// Adds a fact about the machine.
    pub fn fact(&mut self, name: &str, value: &str) {
        self.facts.push((name.to_owned(), value.to_owned()));
    }

    /// Adds a figure.
    pub fn row(&mut self, what: &str, value: f64, unit: &str, target: Target) {
        let (target, met) = match target {
            Target::Most(most) => (format!("≤ {}", number(most)), Some(value <= most)),
            Target::Least(least) => (format!("≥ {}", number(least)), Some(value >= least)),
            Target::MostTimes(factor, of) => most_times(value, factor, of, "floor"),
            Target::MostTimesOf(factor, of, which) => most_times(value, factor, of, which),
            Target::LeastTimes(factor, of) => least_times(value, factor, of, "floor"),
            Target::LeastTimesOf(factor, of, which) => least_times(value, factor, of, which),
            Target::None => (String::new(), None),
        };
        let measured = match unit {
            RATIO => format!("{value:.2} {unit}"),
            _ => format!("{} {unit}", number(value)),
        };
        eprintln!("{what}: {measured} {target}");
        self.rows.push(Row { what: what.to_owned(), measured, target, met });
    }
}

impl fmt::Display for Table {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let facts: Vec<_> = self.facts.iter().map(|(name, value)| format!("{name}: {value}")).collect();
        writeln!(formatter, "{}\n", facts.join(" · "))?;
        writeln!(formatter, "| what | measured | target | met |\n| --- | ---: | --- | --- |")?;
        for row in &self.rows {
            let met = row.met.map_or("", |met| if met { "yes" } else { "**no**" });
            writeln!(formatter, "| {} | {} | {} | {met} |", row.what, row.measured, row.target)?;
        }
        Ok(())
    }
}

fn most_times(value: f64, factor: f64, of: f64, which: &str) -> (String, Option<bool>) {
    (format!("≤ {factor} × {which}; is {:.2} ×", value / of), Some(value <= factor * of))
}

fn least_times(value: f64, factor: f64, of: f64, which: &str) -> (String, Option<bool>) {
    (format!("≥ {factor} × {which}; is {:.2} ×", value / of), Some(value >= factor * of))
}

/// A figure, as long as it tells something.
pub fn number(value: f64) -> String {
    if value.fract() == 0.0 || value >= 100.0 { format!("{value:.0}") } else { format!("{value:.1}") }
}

/// Milliseconds since then.
pub fn ms_since(begun: Instant) -> f64 {
    ms(begun.elapsed())
}

/// Milliseconds.
pub fn ms(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}
