//! What this machine lacks to carry sandboxes, and what would be better otherwise: the checks behind `oc node doctor`.
//!
//! A check is a small function of a [`Host`], a view of a machine that tests make up as a directory, and answers with a
//! [`HostCheck`]. Nothing on the host is changed, but for two files that are made and removed in the data directory.
//!
//! - [`host`]: the view; [`finding`]: what a check may find; [`subject`]: what is asked about.
//! - [`processor`], [`kvm`], [`memory`], [`kernel`], [`cgroups`], [`network`], [`disk`], [`programs`]: the checks.
//!
//! What is recommended, where nothing else is said, is what Firecracker's `docs/prod-host-setup.md` recommends. It is a warning:
//! a problem is what keeps a VMM from running sandboxes at all.

pub mod cgroups;
pub mod disk;
pub mod finding;
pub mod host;
pub mod kernel;
pub mod kvm;
pub mod memory;
pub mod network;
pub mod processor;
pub mod programs;
pub mod subject;

use std::sync::LazyLock;

use oc_proto::{
    DESCRIPTORS,
    v1::{HostCheck, HostCheckStatus, HostReport, VmmKind},
};
use prost::Message as _;
use prost_reflect::{DescriptorPool, DynamicMessage};

use self::{host::Host, subject::Subject};

/// Name of the command on the program's command line.
pub const COMMAND: &str = "doctor";

/// Looks at all that matters to `subject`. Takes a few seconds where a kernel is tried under KVM.
pub async fn examine(host: &Host, subject: &Subject) -> HostReport {
    let mut checks = processor::all(host);
    checks.extend(kvm::all(host, &kvm::try_kernel(host, &subject.image_dir).await));
    checks.extend(memory::all(host));
    checks.extend(kernel::all(host));
    checks.extend(cgroups::all(host));
    if subject.has_network() {
        checks.extend(network::all(host).await);
    }
    checks.extend(disk::all(host, subject));
    checks.extend(programs::all(host, subject).await);
    report(checks, subject)
}

/// What `checks` come to: those that matter to the VMMs that are asked about, and which of these are ready.
fn report(mut checks: Vec<HostCheck>, subject: &Subject) -> HostReport {
    let asked = subject.vmms();
    checks.retain(|check| check.concerns().any(|vmm| asked.contains(&vmm)));
    let is_ready = |vmm: VmmKind| {
        let mut problems = checks.iter().filter(|check| check.status() == HostCheckStatus::Problem);
        !problems.any(|problem| problem.concerns().any(|concerned| concerned == vmm))
    };
    let ready = asked.iter().copied().filter(|&vmm| is_ready(vmm)).map(i32::from).collect();
    HostReport { checks, ready, version: env!("CARGO_PKG_VERSION").to_owned() }
}

#[expect(clippy::expect_used, reason = "our own bytes, made by our own build script")]
static POOL: LazyLock<DescriptorPool> =
    LazyLock::new(|| DescriptorPool::decode(DESCRIPTORS).expect("the contract's descriptors are valid"));

/// The report as proto3 JSON.
#[expect(clippy::expect_used, reason = "both sides are compiled from the same descriptors")]
pub fn to_json(report: &HostReport) -> String {
    let descriptor = POOL.get_message_by_name("oc.v1.HostReport").expect("a message of the contract");
    let message = DynamicMessage::decode(descriptor, report.encode_to_vec().as_slice())
        .expect("the descriptor describes the message");
    serde_json::to_string_pretty(&message).expect("a report has a JSON form")
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use clap::Parser as _;

    use super::{
        finding::{BOTH, FIRECRACKER, Finding, QEMU, check},
        *,
    };

    fn subject(more: &[&str]) -> Subject {
        Subject::try_parse_from(["doctor", "--data-dir", "/var/tmp"].iter().chain(more)).unwrap()
    }

    #[test]
    fn a_vmm_is_ready_unless_a_problem_concerns_it() {
        let checks = || {
            vec![
                check("a", "A", BOTH, Ok(Finding::warning("so so", "do"))),
                check("b", "B", FIRECRACKER, Ok(Finding::problem("none", "make one"))),
                check("c", "C", QEMU, Err(Finding::unknown("who knows"))),
            ]
        };
        let told = report(checks(), &subject(&[]));
        assert_eq!(told.ready().collect::<Vec<_>>(), [VmmKind::Qemu]);
        assert_eq!(told.checks.len(), 3);
        let told = report(checks(), &subject(&["--vmm", "firecracker"]));
        assert_eq!(told.ready().count(), 0);
        assert_eq!(told.checks.iter().map(|check| check.id.as_str()).collect::<Vec<_>>(), ["a", "b"]);
    }

    #[tokio::test]
    async fn this_machine_is_examined() {
        let report = examine(&Host::here(), &subject(&["--image-dir", "/nonexistent"])).await;
        let ids: BTreeSet<&str> = report.checks.iter().map(|check| check.id.as_str()).collect();
        assert_eq!(ids.len(), report.checks.len(), "an ID names one check");
        for check in &report.checks {
            let kebab = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-';
            assert!(check.id.bytes().all(kebab), "{check:?}");
            assert!(!check.title.is_empty() && !check.found.is_empty(), "{check:?}");
            assert!(check.concerns().count() > 0, "{check:?}");
            let is_bad = matches!(check.status(), HostCheckStatus::Warning | HostCheckStatus::Problem);
            assert_eq!(is_bad, !check.remedy.is_empty(), "{check:?}");
        }
        let json: serde_json::Value = serde_json::from_str(&to_json(&report)).unwrap();
        assert_eq!(json["checks"].as_array().map(Vec::len), Some(report.checks.len()));
        assert_eq!(json["version"], env!("CARGO_PKG_VERSION"));
    }
}
