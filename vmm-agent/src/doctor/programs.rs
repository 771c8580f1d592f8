//! The programs that the agent runs, and what it makes sandboxes of.

use std::path::Path;

use oc_proto::v1::HostCheck;

use super::{
    finding::{BOTH, FIRECRACKER, Finding, QEMU, check},
    host::Host,
    subject::Subject,
};
use crate::driver::{
    firecracker::version::{FIRST_NOT, GOOD, OLDEST, Version},
    qemu, template,
};

/// Older ones do not restore clones as they should (`tools/setup`).
const QEMU_LEAST: u32 = 10;
/// All of them.
pub async fn all(host: &Host, subject: &Subject) -> Vec<HostCheck> {
    let firecracker = version_of(host, &subject.firecracker, "--firecracker").await;
    let jailer = version_of(host, &subject.jailer, "--jailer").await;
    vec![
        qemu(host).await,
        firecracker_program(&firecracker),
        jailer_program(&jailer, firecracker.as_ref().ok()),
        filesystem_tools(host),
        templates(host, &subject.image_dir),
    ]
}

/// QEMU.
pub async fn qemu(host: &Host) -> HostCheck {
    let finding = match host.program(Path::new(qemu::PROGRAM)) {
        None => Finding::problem(format!("there is no program {}", qemu::PROGRAM), "install qemu-system-x86"),
        Some(program) => match host.run(&program, &["--version"]).await {
            Err(reason) => Finding::problem(reason, "install qemu-system-x86 anew"),
            Ok(text) => judge_qemu(&text),
        },
    };
    check("qemu", "QEMU", QEMU, Ok(finding))
}

fn judge_qemu(text: &str) -> Finding {
    let version =
        text.lines().next().and_then(|line| line.split_once("version ")).map(|(_, version)| version);
    let major = version.and_then(|version| version.split('.').next()?.parse::<u32>().ok());
    match (version, major) {
        (Some(version), Some(major)) if major >= QEMU_LEAST => Finding::ok(version),
        (Some(version), Some(_)) => Finding::problem(
            format!("{version}, which does not restore clones as it should"),
            format!("install QEMU {QEMU_LEAST} or newer; on Debian 12 from bookworm-backports"),
        ),
        _ => {
            Finding::unknown(format!("it prints {:?} for a version", text.lines().next().unwrap_or_default()))
        }
    }
}

/// The version of the program called `named`, or what is wrong with it.
async fn version_of(host: &Host, named: &Path, option: &str) -> Result<Version, Finding> {
    let remedy = format!(
        "install firecracker and jailer of one release, {OLDEST} or later and before {FIRST_NOT}, and name them \
         with {option} (docs/firecracker-host.md)"
    );
    let Some(program) = host.program(named) else {
        return Err(Finding::problem(format!("there is no program {}", named.display()), remedy));
    };
    let text =
        host.run(&program, &["--version"]).await.map_err(|reason| Finding::problem(reason, &remedy))?;
    text.parse().map_err(|reason| Finding::problem(format!("{}: {reason}", program.display()), remedy))
}

/// Firecracker, of which not every version will do.
pub fn firecracker_program(version: &Result<Version, Finding>) -> HostCheck {
    check("firecracker", "Firecracker", FIRECRACKER, version.clone().map(judge_firecracker))
}

fn judge_firecracker(version: Version) -> Finding {
    if version < OLDEST || version >= FIRST_NOT {
        let why = match version {
            Version(1, 16, 0 | 1) => ": after a pause and resume its guests hang up on the host for ever",
            _ => ", which was not tried",
        };
        return Finding::problem(
            format!("{version}{why}"),
            format!("install the newest version before {FIRST_NOT}"),
        );
    }
    if version < GOOD {
        return Finding::warning(
            format!("{version}, with known faults of restored guests"),
            format!(
                "install the newest version before {FIRST_NOT}; checkpoints are restored by the version that took them"
            ),
        );
    }
    Finding::ok(version)
}

/// Its jailer, which must be of the same release.
pub fn jailer_program(jailer: &Result<Version, Finding>, firecracker: Option<&Version>) -> HostCheck {
    let finding = jailer.clone().map(|jailer| match firecracker {
        Some(&firecracker) if firecracker != jailer => Finding::problem(
            format!("{jailer}, beside Firecracker {firecracker}"),
            format!("install the jailer of release {firecracker}"),
        ),
        _ => Finding::ok(jailer),
    });
    check("jailer", "Jailer", FIRECRACKER, finding)
}

/// What makes sandboxes' disks.
pub fn filesystem_tools(host: &Host) -> HostCheck {
    let finding = match host.program(Path::new("mke2fs")) {
        Some(program) => Finding::ok(program.display()),
        None => Finding::problem(
            "there is no program mke2fs",
            "install e2fsprogs, and have its directory in PATH",
        ),
    };
    check("e2fsprogs", "e2fsprogs", BOTH, Ok(finding))
}

/// What sandboxes boot from.
pub fn templates(host: &Host, image_dir: &Path) -> HostCheck {
    let finding = template::find(&host.path(image_dir))
        .map_err(|error| Finding::unknown(format!("cannot look into {}: {error}", image_dir.display())))
        .map(|templates| {
            if templates.is_empty() {
                return Finding::problem(
                    format!("there is none in {}", image_dir.display()),
                    "build one with `make setup`, or name its directory with --image-dir",
                );
            }
            let names: Vec<_> = templates.iter().map(|template| template.name.as_str()).collect();
            Finding::ok(names.join(", "))
        });
    check("templates", "Templates", BOTH, finding)
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;
    use oc_proto::v1::HostCheckStatus::{self, Ok as Fine, Problem, Unknown, Warning};

    use super::{super::host::made_up::Machine, *};

    fn status(finding: Finding) -> HostCheckStatus {
        check("x", "X", BOTH, Ok(finding)).status()
    }

    #[test]
    fn only_some_versions_of_firecracker_will_do() {
        for (version, wanted) in [
            (Version(1, 12, 0), Problem),
            (Version(1, 12, 1), Warning),
            (Version(1, 14, 4), Warning),
            (Version(1, 15, 0), Fine),
            (Version(1, 15, 9), Fine),
            (Version(1, 16, 0), Problem),
            (Version(1, 16, 1), Problem),
            (Version(1, 17, 0), Problem),
            (Version(2, 0, 0), Problem),
        ] {
            assert_eq!(status(judge_firecracker(version)), wanted, "{version}");
        }
    }

    #[test]
    fn qemu_is_new_enough() {
        for (text, wanted) in [
            ("QEMU emulator version 10.0.2 (Debian 1:10.0.2)\nCopyright", Fine),
            ("QEMU emulator version 7.2.15", Problem),
            ("something else", Unknown),
            ("", Unknown),
        ] {
            assert_eq!(status(judge_qemu(text)), wanted, "{text}");
        }
    }

    #[tokio::test]
    async fn programs_are_asked_for_their_versions() {
        let subject = Subject::try_parse_from(["doctor", "--data-dir", "/data"]).unwrap();
        let machine = Machine::with([]);
        let statuses = async || {
            let checks = all(&machine.host(), &subject).await;
            checks.iter().map(|check| (check.id.clone(), check.status())).collect::<Vec<_>>()
        };
        assert!(statuses().await.iter().all(|(_, status)| *status == Problem));
        machine.program("qemu-system-x86_64", "echo QEMU emulator version 10.1.0");
        machine.program("firecracker", "echo Firecracker v1.15.1");
        machine.program("jailer", "echo Jailer v1.14.4");
        machine.program("mke2fs", "");
        let told = statuses().await;
        let of = |id: &str| told.iter().find(|(name, _)| name == id).unwrap().1;
        assert_eq!(["qemu", "firecracker", "jailer", "e2fsprogs"].map(of), [Fine, Fine, Problem, Fine]);
        machine.program("jailer", "echo Jailer v1.15.1");
        let told = statuses().await;
        assert!(told.contains(&("jailer".to_owned(), Fine)), "{told:?}");
        machine.program("firecracker", "exit 1");
        assert!(statuses().await.contains(&("firecracker".to_owned(), Problem)));
    }
}
