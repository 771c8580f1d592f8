//! What `oc up` says: progress and notes on standard error, the result on standard output. A supervisor in the
//! background says the same to the `oc up --detach` that waits for it, one JSON object a line, and to its log.

use std::{
    io::{self, IsTerminal as _, Write as _},
    path::PathBuf,
    time::Duration,
};

use indicatif::ProgressBar;
use serde::{Deserialize, Serialize};
use serde_json::json;
use tokio::time::Instant;

use crate::{
    failure::Failure,
    output::{self, Output},
    progress,
    quote::quote,
};

/// Plain lines repeat what they wait for this often.
const REPEAT: Duration = Duration::from_secs(10);

/// A mesh that may be used.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Ready {
    /// URL of the gateway.
    pub url: String,
    /// Name of this machine in the mesh.
    pub host_id: String,
    /// `kvm` or `tcg`.
    pub accelerator: String,
    /// VMM and version.
    pub vmm: String,
    /// Clones that wait in the pool.
    pub pool_ready: i32,
    /// The state directory.
    pub state_dir: PathBuf,
    /// Process ID of the supervisor.
    pub pid: i32,
    /// Milliseconds that it took.
    pub took_ms: u64,
}

/// One line to the waiting parent.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Line {
    /// What is waited for now.
    Progress(String),
    /// Something happened.
    Note(String),
    /// The mesh may be used.
    Ready(Ready),
    /// There will be no mesh.
    Failed {
        /// The error's text.
        message: String,
        /// The error's code.
        code: String,
        /// The exit code it stands for.
        exit: u8,
    },
}

/// Says it.
#[derive(Debug)]
pub struct Reporter {
    to: To,
    stage: String,
    said: Option<Instant>,
    spinner: Option<ProgressBar>,
}

#[derive(Debug)]
enum To {
    Terminal { output: Output, detached: bool },
    Parent,
}

impl Reporter {
    /// To whoever typed the command; `detached` if the mesh will go on without it.
    pub fn terminal(output: Output, detached: bool) -> Self {
        Self { to: To::Terminal { output, detached }, stage: String::new(), said: None, spinner: None }
    }

    /// To the waiting parent.
    pub fn parent() -> Self {
        Self { to: To::Parent, stage: String::new(), said: None, spinner: None }
    }

    /// Says what is waited for. May be called often.
    pub fn progress(&mut self, stage: &str) {
        let changed = self.stage != stage;
        stage.clone_into(&mut self.stage);
        match self.to {
            To::Parent => {
                if changed {
                    tell(&Line::Progress(stage.to_owned()));
                }
            }
            To::Terminal { .. } if io::stderr().is_terminal() => {
                let spinner = self.spinner.get_or_insert_with(progress::spinner);
                if changed {
                    spinner.set_message(stage.to_owned());
                }
            }
            To::Terminal { .. } => {
                if changed || self.said.is_none_or(|at| at.elapsed() >= REPEAT) {
                    self.said = Some(Instant::now());
                    output::note(stage);
                }
            }
        }
    }

    /// Says that something happened.
    pub fn note(&mut self, text: &str) {
        match (&self.to, &self.spinner) {
            (To::Parent, _) => {
                tell(&Line::Note(text.to_owned()));
                output::note(format_args!("{} {text}", jiff::Timestamp::now()));
            }
            (To::Terminal { .. }, Some(spinner)) => spinner.suspend(|| output::note(text)),
            (To::Terminal { .. }, None) => output::note(text),
        }
    }

    /// Nothing is waited for any more.
    pub fn quiet(&mut self) {
        self.stage.clear();
        self.said = None;
        if let Some(spinner) = self.spinner.take() {
            spinner.finish_and_clear();
        }
    }

    /// Says that the mesh may be used.
    pub fn ready(&mut self, ready: &Ready) -> Result<(), Failure> {
        self.quiet();
        match self.to {
            To::Parent => {
                tell(&Line::Ready(ready.clone()));
                Ok(())
            }
            To::Terminal { output, detached } => output.show(|| json!(ready), || ready.text(detached)),
        }
    }

    /// Says that there will be no mesh.
    pub fn failed(&mut self, failure: &Failure) {
        self.quiet();
        if let To::Parent = self.to {
            tell(&Line::Failed {
                message: failure.to_string(),
                code: failure.code(),
                exit: failure.exit_code(),
            });
        }
    }
}

impl Drop for Reporter {
    fn drop(&mut self) {
        self.quiet();
    }
}

impl Ready {
    fn text(&self, detached: bool) -> String {
        let directory = match self.state_dir.display().to_string() {
            default if default == "/var/lib/opencomputer" => String::new(),
            other => format!(" --state-dir {}", quote(&other)),
        };
        let accelerator = match self.accelerator.as_str() {
            "tcg" => "tcg: real microVMs, emulated in software, not isolated by hardware".to_owned(),
            other => other.to_owned(),
        };
        let stop = if detached { format!("oc down{directory}") } else { "Ctrl-C".to_owned() };
        let seconds = Duration::from_millis(self.took_ms).as_secs_f64();
        let facts = output::pairs([
            ("  accelerator", accelerator),
            ("  vmm", self.vmm.clone()),
            ("  state", format!("{} (logs in log/)", self.state_dir.display())),
            ("  to use it", format!("eval \"$(oc env{})\"", directory)),
            ("  to stop it", stop),
        ]);
        format!("mesh ready after {seconds:.1} s: {}\n{facts}", self.url)
    }
}

fn tell(line: &Line) {
    if let Ok(json) = serde_json::to_string(line) {
        // The parent leaves once the mesh is ready.
        let _ = writeln!(io::stdout(), "{json}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ready(state_dir: &str, accelerator: &str) -> Ready {
        Ready {
            url: "http://127.0.0.1:8080".into(),
            host_id: "local".into(),
            accelerator: accelerator.into(),
            vmm: "qemu 10.0.2".into(),
            pool_ready: 1,
            state_dir: state_dir.into(),
            pid: 1,
            took_ms: 1234,
        }
    }

    #[test]
    fn the_result_says_how_to_go_on() {
        let text = ready("/var/lib/opencomputer", "kvm").text(false);
        assert!(text.starts_with("mesh ready after 1.2 s: http://127.0.0.1:8080\n"), "{text}");
        assert!(text.contains("eval \"$(oc env)\""), "{text}");
        assert!(text.contains("Ctrl-C"), "{text}");
        let text = ready("/tmp/a b", "tcg").text(true);
        assert!(text.contains("oc down --state-dir '/tmp/a b'"), "{text}");
        assert!(text.contains("not isolated by hardware"), "{text}");
    }

    #[test]
    fn lines_to_the_parent_come_through() {
        let line = serde_json::to_string(&Line::Ready(ready("/s", "tcg"))).unwrap();
        let Line::Ready(back) = serde_json::from_str(&line).unwrap() else { panic!("{line}") };
        assert_eq!(back, ready("/s", "tcg"));
    }
}
