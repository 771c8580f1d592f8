//! What a microVM and its services are on the host.

use std::{fs, os::unix::fs::MetadataExt as _, path::PathBuf, sync::Arc};

use anyhow::{Context as _, ensure};
use oc_integration::{
    mesh::{Mesh, eventually},
    processes,
};
use serde_json::json;

/// User IDs of VMMs begin here (vmm-agent/src/driver/home.rs).
const FIRST_UID: u32 = 1_879_048_193;

/// The VMM of a sandbox, and its home: the agent's journal says which.
fn vmm_of(mesh: &Mesh, sandbox_id: &str) -> anyhow::Result<(i32, PathBuf)> {
    for entry in fs::read_dir(mesh.state().join("agent/journal"))? {
        let path = entry?.path();
        // Those of other tests come and go.
        if !fs::read_to_string(&path).is_ok_and(|record| record.contains(sandbox_id)) {
            continue;
        }
        let home = mesh.state().join("agent/vms").join(path.file_stem().context("no name")?);
        let name = home.display().to_string();
        let vmms = processes::vmms(mesh.state());
        let vmm = vmms.iter().find(|vmm| vmm.command.join(" ").contains(&name)).context("no VMM")?;
        return Ok((vmm.pid, home));
    }
    anyhow::bail!("the journal knows no {sandbox_id}")
}

pub async fn a_vmm_is_nobody_and_bounded(mesh: Arc<Mesh>) -> anyhow::Result<()> {
    let sandboxes = [mesh.rest().create(json!({})).await?, mesh.rest().create(json!({})).await?];
    let ours = |path: String| fs::read_link(path).map(|link| link.display().to_string()).unwrap_or_default();
    let mut users = std::collections::HashSet::new();
    for sandbox in sandboxes {
        let (pid, home) = vmm_of(&mesh, &sandbox.id)?;
        let proc = format!("/proc/{pid}");
        let status = fs::read_to_string(format!("{proc}/status"))?;
        let field = |name: &str| -> Option<Vec<String>> {
            let line = status.lines().find_map(|line| line.strip_prefix(name))?;
            Some(line.split_whitespace().map(str::to_owned).collect())
        };
        let uid = field("Uid:").context("no Uid")?;
        assert!(uid.iter().all(|uid| uid.parse::<u32>().unwrap() >= FIRST_UID), "{uid:?}");
        assert!(users.insert(uid.clone()), "two VMMs have the same user");
        for set in ["CapPrm:", "CapEff:", "CapInh:", "CapAmb:"] {
            assert_eq!(field(set).context(set)?, ["0000000000000000"], "{set}");
        }
        assert_eq!(field("NoNewPrivs:").context("NoNewPrivs")?, ["1"]);
        assert_eq!(field("Seccomp:").context("Seccomp")?, ["2"], "QEMU's own sandbox is on");
        assert_ne!(ours(format!("{proc}/ns/net")), ours("/proc/self/ns/net".into()));
        assert_ne!(ours(format!("{proc}/ns/ipc")), ours("/proc/self/ns/ipc".into()));
        let groups = fs::read_to_string(format!("{proc}/cgroup"))?;
        assert!(groups.contains(&format!("opencomputer/{}-", mesh.host_id())), "{groups}");
        let limits = fs::read_to_string(format!("{proc}/limits"))?;
        assert!(
            limits.lines().any(|line| line.starts_with("Max core file size") && line.contains(" 0 ")),
            "{limits}"
        );
        // Its disk is its user's alone, in a home that is not.
        let (layer, place) = (fs::metadata(home.join("layer.img"))?, fs::metadata(&home)?);
        assert_eq!((layer.uid().to_string(), layer.mode() & 0o077), (uid[0].clone(), 0));
        assert_eq!((place.uid(), place.mode() & 0o027), (0, 0), "{}", home.display());
        sandbox.delete().await?;
    }
    Ok(())
}

pub async fn nothing_secret_is_logged(mesh: Arc<Mesh>) -> anyhow::Result<()> {
    let sandbox = mesh.rest().create(json!({ "envs": { "PASSWORD": "hush-hush-1" } })).await?;
    sandbox
        .run_with(
            json!({ "cmd": "echo hush-hush-2", "envs": { "P": "hush-hush-3" }, "stdin": "hush-hush-4" }),
        )
        .await?;
    let token = sandbox.facts["token"].as_str().unwrap();
    let rest = mesh.rest();
    rest.send(rest.anonymous(reqwest::Method::GET, &format!("{}?token={token}", sandbox.path(""))))
        .await?
        .expect(200)?;
    // The token of its ports: one that is chosen, and one that is made.
    let chosen =
        json!({ "port": 8000, "authConfig": { "scheme": "bearer", "token": "hush-hush-preview-5" } });
    rest.post(&sandbox.path("/preview"), chosen).await?.expect(201)?;
    let rotated = rest.post(&sandbox.path("/preview/rotate"), json!({})).await?.expect(200)?.json();
    let of_ports = rotated["previewAuthToken"].as_str().unwrap();
    let host = format!("{}-p8000.preview.localhost", sandbox.id);
    let asked = |header: &str, token: &str| {
        rest.anonymous(reqwest::Method::GET, "/").header("host", &host).header(header, token)
    };
    for (request, status) in [
        (asked("x-oc-preview-token", of_ports), 502),
        (asked("authorization", &format!("Bearer {of_ports}")), 502),
        (asked("x-oc-preview-token", "hush-hush-preview-5"), 401),
    ] {
        rest.send(request).await?.expect(status)?;
    }
    sandbox.delete().await?;
    eventually("requests are logged with their sandbox", async || {
        let log = fs::read_to_string(mesh.state().join("log/gateway.log"))?;
        ensure!(log.lines().any(|line| line.contains(&sandbox.id) && line.contains("\"DELETE\"")));
        Ok(())
    })
    .await?;
    for entry in fs::read_dir(mesh.state().join("log"))? {
        let path = entry?.path();
        let text = fs::read_to_string(&path)?;
        for secret in ["hush-hush", token, of_ports, mesh.key.as_str()] {
            assert!(!text.contains(secret), "{} has a secret", path.display());
        }
    }
    // The key is kept for its owner alone, and the store knows hashes only.
    assert_eq!(fs::metadata(mesh.state().join("api-key"))?.mode() & 0o777, 0o600);
    for file in ["store.db", "store.db-wal"] {
        let Ok(bytes) = fs::read(mesh.state().join(file)) else { continue };
        for secret in [&mesh.key, of_ports, "hush-hush-preview-5"] {
            let secret = &secret.as_bytes()[..secret.len().min(20)];
            assert!(!bytes.windows(secret.len()).any(|window| window == secret), "{file} has a secret");
        }
    }
    Ok(())
}
