//! Our figures beside those that the best open peer has published of itself.

use std::fmt;

use crate::table::number;

/// Our figures, of this run, milliseconds.
#[derive(Clone, Copy, Debug)]
pub struct Ours {
    /// A live fork, until it has answered a command.
    pub clone_ms: f64,
    /// Twenty of them, until all have.
    pub twenty_clones_ms: f64,
    /// A full checkpoint at rest, until the call is answered.
    pub checkpoint_ms: f64,
    /// What it takes longer for each 100 MiB of changed memory.
    pub per_100_mib_ms: f64,
    /// From a command for a hibernated sandbox to its output.
    pub wake_ms: f64,
}

impl fmt::Display for Ours {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let published = "best open peer, as published for a cloud VM with paravirtual KVM; not measured here";
        writeln!(formatter, "| what | ours, measured here | {published} |\n| --- | ---: | ---: |")?;
        let checkpoint =
            format!("{} ms + {} ms per 100 MiB", number(self.checkpoint_ms), number(self.per_100_mib_ms));
        let rows = [
            ("live clone (ours: until it has answered a command)", ms(self.clone_ms), "271 ms"),
            ("20 live clones at once (ours: until all have)", ms(self.twenty_clones_ms), "790 ms"),
            ("checkpoint + what changed memory adds", checkpoint, "41 ms + 22 ms per 100 MiB"),
            ("resume (ours: from a command's call to its output)", ms(self.wake_ms), "19 ms"),
        ];
        for (what, ours, theirs) in rows {
            writeln!(formatter, "| {what} | {ours} | {theirs} |")?;
        }
        Ok(())
    }
}

fn ms(figure: f64) -> String {
    format!("{} ms", number(figure))
}
