//! What runs the guests' instructions here: hardware virtualisation if it really does, else software emulation.

use std::{collections::HashSet, io, path::Path, process::Stdio, time::Duration};

use tokio::{process::Command, time::timeout};
use tracing::info;

use super::qemu::{Accelerator, PROGRAM};
use crate::config::AcceleratorChoice;

/// A kernel that really runs on hardware gives up its missing root filesystem within a second.
const PANICS_WITHIN: Duration = Duration::from_secs(5);
/// What it says then (`mount_root_generic` and `panic` in Linux).
const PANIC: &str = "Kernel panic";

/// Decides, and says why in the log.
///
/// # Errors
///
/// If hardware virtualisation is asked for and does not work.
pub async fn choose(choice: AcceleratorChoice, kernel: Option<&Path>) -> io::Result<Accelerator> {
    if choice == AcceleratorChoice::Tcg {
        info!(accelerator = "tcg", reason = "chosen by configuration", "accelerator");
        return Ok(Accelerator::Tcg);
    }
    match (probe(kernel).await, choice) {
        (Ok(()), _) => {
            info!(accelerator = "kvm", reason = "a kernel booted under it", "accelerator");
            Ok(Accelerator::Kvm)
        }
        (Err(reason), AcceleratorChoice::Kvm) => {
            Err(io::Error::other(format!("hardware virtualisation does not work here: {reason}")))
        }
        (Err(reason), _) => {
            info!(accelerator = "tcg", reason, "accelerator");
            Ok(Accelerator::Tcg)
        }
    }
}

/// Whether this host says that it has hardware virtualisation. That it makes guests go on is another thing, for which `kernel` is
/// what a template brings to try it with.
///
/// # Errors
///
/// What it lacks.
pub fn virtualises(kernel: Option<&Path>) -> Result<&Path, String> {
    if let Err(error) = std::fs::File::options().read(true).write(true).open("/dev/kvm") {
        return Err(format!("/dev/kvm cannot be opened: {error}"));
    }
    let cpuinfo = std::fs::read_to_string("/proc/cpuinfo").map_err(|error| error.to_string())?;
    if extension(&cpuinfo).is_none() {
        return Err("the processor shows neither VMX nor SVM".into());
    }
    kernel.ok_or_else(|| "no template brings a kernel to try it with".into())
}

/// Whether a guest makes progress under QEMU with KVM: the device alone does not tell. Takes some seconds at most.
///
/// # Errors
///
/// Why it is not known to.
pub async fn probe(kernel: Option<&Path>) -> Result<(), String> {
    let kernel = virtualises(kernel)?;
    let mut qemu = Command::new(PROGRAM);
    qemu.args(["-machine", "microvm,acpi=on", "-accel", "kvm", "-cpu", "host", "-m", "256M", "-kernel"])
        .arg(kernel)
        .args(["-append", "console=ttyS0 panic=-1 reboot=t", "-serial", "stdio", "-display", "none"])
        .args(["-nodefaults", "-no-user-config", "-no-reboot"]);
    comes_up(qemu, "KVM").await
}

/// Whether the kernel that `vmm` boots, with its console on standard output, comes as far as to miss its root filesystem.
/// `under` is what to call that in a reason.
///
/// # Errors
///
/// Why not.
pub async fn comes_up(mut vmm: Command, under: &str) -> Result<(), String> {
    let output = vmm.stdin(Stdio::null()).kill_on_drop(true).output();
    let output = match timeout(PANICS_WITHIN, output).await {
        Err(_) => return Err(format!("a kernel under {under} did not come up within {PANICS_WITHIN:?}")),
        Ok(Err(error)) => {
            return Err(format!("cannot run {}: {error}", vmm.as_std().get_program().display()));
        }
        Ok(Ok(output)) => output,
    };
    let [said, complained] = [&output.stdout, &output.stderr].map(|text| String::from_utf8_lossy(text));
    if said.contains(PANIC) {
        return Ok(());
    }
    // QEMU complains where it should, Firecracker where its guest speaks.
    let last = complained.lines().last().or_else(|| said.lines().last()).unwrap_or("without a message");
    Err(format!("a kernel under {under} ended early: {last}"))
}

/// What a processor virtualises by, of which `/proc/cpuinfo` says this.
pub fn extension(cpuinfo: &str) -> Option<&'static str> {
    let flags = cpuinfo.lines().filter(|line| line.starts_with("flags")).flat_map(str::split_whitespace);
    let flags: HashSet<&str> = flags.collect();
    ["vmx", "svm"].into_iter().find(|flag| flags.contains(flag))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_the_processors_flags() {
        assert_eq!(extension("model name\t: x\nflags\t\t: fpu svm sse\n"), Some("svm"));
        assert_eq!(extension("flags : vmx"), Some("vmx"));
        assert_eq!(extension("flags : fpu\nvmx flags\t: ept\n"), None);
    }

    #[tokio::test]
    async fn emulation_needs_no_probe() {
        assert_eq!(choose(AcceleratorChoice::Tcg, None).await.unwrap(), Accelerator::Tcg);
    }
}
