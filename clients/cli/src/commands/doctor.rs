//! `oc node doctor`: the vmm-agent's program looks at this machine, and here it is told to people.

use std::{
    ffi::OsString,
    fmt::Write as _,
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};

use clap::ValueEnum;
use oc_proto::v1::{HostCheck, HostCheckStatus, HostReport, VmmKind};
use tokio::{process::Command, time::timeout};

use crate::{
    arguments::{Global, nodes::DoctorArguments},
    failure::Failure,
    json,
    output::{self, Output},
    up::{
        layout::Layout,
        plan::{self, AGENT},
    },
};

/// A kernel is tried under KVM, and programs are asked for their versions: some seconds, on a host that does not stand still.
const WITHIN: Duration = Duration::from_secs(120);
/// Nothing keeps this machine from running sandboxes, by one VMM at least.
const READY: u8 = 0;
/// None of the VMMs that were asked about runs any.
const NOT_READY: u8 = 1;

/// Those that there are.
const EVERY_VMM: &[VmmKind] = &[VmmKind::Qemu, VmmKind::Firecracker];

/// `oc node doctor`; its exit code.
pub async fn run(global: &Global, arguments: &DoctorArguments, output: Output) -> Result<u8, Failure> {
    let bin_dir = match &arguments.bin_dir {
        Some(directory) => directory.clone(),
        None => plan::beside_oc()?,
    };
    let data_dir = match &arguments.data_dir {
        Some(directory) => directory.clone(),
        None => Layout::new(&global.state_dir)?.agent(),
    };
    let report = ask(&plan::program(&bin_dir, AGENT), &options(arguments, data_dir)).await?;
    output.show(|| json::of(&report), || shown(&report, arguments.vmm.kinds()))?;
    Ok(if report.ready.is_empty() { NOT_READY } else { READY })
}

/// What the agent's program is told.
fn options(arguments: &DoctorArguments, data_dir: PathBuf) -> Vec<OsString> {
    let mut words: Vec<OsString> = vec!["doctor".into(), "--data-dir".into(), data_dir.into()];
    let paths = [
        ("--image-dir", &arguments.image_dir),
        ("--firecracker", &arguments.firecracker),
        ("--jailer", &arguments.jailer),
    ];
    for (option, path) in paths {
        if let Some(path) = path {
            words.extend([option.into(), path.into()]);
        }
    }
    words.extend(["--network".into(), name_of(arguments.network).into()]);
    words.extend(["--vmm".into(), name_of(arguments.vmm).into()]);
    words
}

fn name_of(value: impl ValueEnum) -> String {
    value.to_possible_value().map(|value| value.get_name().to_owned()).unwrap_or_default()
}

/// Has the agent's program look.
async fn ask(program: &Path, options: &[OsString]) -> Result<HostReport, Failure> {
    let output = Command::new(program).args(options).stdin(Stdio::null()).kill_on_drop(true).output();
    let named = program.display();
    let output = timeout(WITHIN, output)
        .await
        .map_err(|_| Failure::Unfit(format!("{named} says nothing for {} s", WITHIN.as_secs())))?
        .map_err(|error| Failure::local(format!("cannot run {named} (its directory is --bin-dir)"), error))?;
    if !output.status.success() {
        let complaint = String::from_utf8_lossy(&output.stderr);
        return Err(Failure::Unfit(format!("{named} cannot look at this machine: {}", complaint.trim())));
    }
    json::read(&output.stdout)
        .map_err(|error| Failure::Unfit(format!("{named} is of another version than oc: {error}")))
}

/// The report for people: all checks, what to do, and what it comes to for the VMMs that were asked about.
fn shown(report: &HostReport, asked: &[VmmKind]) -> String {
    let rows = report.checks.iter().map(|check| {
        [word(check.status()).to_owned(), check.id.clone(), concerned(check), check.found.clone()]
    });
    let mut text = output::table(["STATUS", "CHECK", "FOR", "FOUND"], rows);
    let to_do = report.checks.iter().filter(|check| !check.remedy.is_empty());
    let to_do = output::pairs(to_do.map(|check| (check.title.as_str(), check.remedy.clone())));
    if !to_do.is_empty() {
        let _ = write!(text, "\nTo do:\n{to_do}");
    }
    text.push('\n');
    for &vmm in asked {
        let is_ready = report.ready().any(|ready| ready == vmm);
        let in_the_way = report.checks.iter().filter(|check| {
            check.status() == HostCheckStatus::Problem && check.concerns().any(|other| other == vmm)
        });
        let in_the_way: Vec<_> = in_the_way.map(|check| check.id.as_str()).collect();
        let _ = match is_ready {
            true => writeln!(text, "{} can run sandboxes here", name(vmm)),
            false => writeln!(text, "{} runs no sandboxes here: {}", name(vmm), in_the_way.join(", ")),
        };
    }
    output::Printable(&text).to_string()
}

fn word(status: HostCheckStatus) -> &'static str {
    match status {
        HostCheckStatus::Ok => "ok",
        HostCheckStatus::Warning => "warning",
        HostCheckStatus::Problem => "problem",
        HostCheckStatus::Unknown | HostCheckStatus::Unspecified => "unknown",
    }
}

fn concerned(check: &HostCheck) -> String {
    if EVERY_VMM.iter().all(|&vmm| check.concerns().any(|concerned| concerned == vmm)) {
        return "all".to_owned();
    }
    check.concerns().map(name).collect::<Vec<_>>().join(", ")
}

fn name(vmm: VmmKind) -> &'static str {
    match vmm {
        VmmKind::Qemu => "qemu",
        VmmKind::Firecracker => "firecracker",
        VmmKind::Unspecified => "another",
    }
}

impl crate::arguments::nodes::Vmm {
    /// The VMMs that are meant.
    fn kinds(self) -> &'static [VmmKind] {
        match self {
            Self::Auto => EVERY_VMM,
            Self::Qemu => &[VmmKind::Qemu],
            Self::Firecracker => &[VmmKind::Firecracker],
        }
    }
}
