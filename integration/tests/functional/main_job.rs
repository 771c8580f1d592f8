//! The life of one sandbox.

use std::{sync::Arc, time::Duration};

use anyhow::ensure;
use oc_integration::mesh::{Mesh, eventually};
use reqwest::Method;
use serde_json::json;

pub async fn the_main_job_is_done_from_create_to_delete(mesh: Arc<Mesh>) -> anyhow::Result<()> {
    let rest = mesh.rest();
    let sandbox =
        rest.create(json!({ "metadata": { "for": "a test" }, "envs": { "GREETING": "hello" } })).await?;
    let facts = &sandbox.facts;
    assert_eq!(facts["status"], "running");
    assert_eq!(
        (&facts["templateID"], &facts["memoryMB"], &facts["cpuCount"]),
        (&json!("base"), &json!(1024), &json!(1))
    );
    assert_eq!(facts["metadata"], json!({ "for": "a test" }));
    assert_eq!(facts["connectURL"], json!(mesh.url));
    assert!(["kvm", "tcg"].contains(&facts["accelerator"].as_str().unwrap()));
    assert!(sandbox.id.starts_with("sb-") && sandbox.id.len() == 23, "{}", sandbox.id);

    let guest = sandbox.run("uname -r").await?;
    let host = std::fs::read_to_string("/proc/sys/kernel/osrelease")?;
    assert_ne!(guest, host, "the guest has a kernel of its own");
    assert_eq!(
        sandbox.run("echo $GREETING from $(whoami)@$(hostname) in $(pwd)").await?,
        "hello from sandbox@sandbox in /home/sandbox\n"
    );
    assert_eq!(sandbox.run("python3 -c 'print(6 * 7)'; node -p '6 * 7'").await?, "42\n42\n");
    assert_eq!(sandbox.run("sudo id -u; readlink /workspace; npm --version >/dev/null; git --version | cut -c 1-4; echo 'int main(void){return 0;}' > a.c && gcc a.c && ./a.out && echo built").await?, "0\n/home/sandbox\ngit \nbuilt\n");

    sandbox.put("notes/a b.txt", "written").await?.expect(204)?;
    assert_eq!(sandbox.run("cat 'notes/a b.txt'").await?, "written");
    sandbox.run("echo -n changed > 'notes/a b.txt'").await?;
    assert_eq!(sandbox.read("/home/sandbox/notes/a b.txt").await?.expect(200)?.body, "changed");

    assert!(rest.list().await?.contains(&sandbox.id));
    assert_eq!(sandbox.get().await?.expect(200)?.json()["sandboxID"], json!(sandbox.id));
    sandbox.delete().await?;
    sandbox.delete().await?;
    assert!(!rest.list().await?.contains(&sandbox.id));
    assert_eq!(sandbox.exec(json!({ "cmd": "true" })).await?.refusal(), (410, "SANDBOX_DELETED".into()));
    assert_eq!(sandbox.get().await?.expect(200)?.json()["status"], "deleted");
    Ok(())
}

pub async fn a_token_is_enough_for_its_sandbox(mesh: Arc<Mesh>) -> anyhow::Result<()> {
    let rest = mesh.rest();
    let (ours, other) = (rest.create(json!({})).await?, rest.create(json!({})).await?);
    let token = ours.facts["token"].as_str().unwrap().to_owned();
    let run = |path: String| rest.anonymous(Method::POST, &path).json(&json!({ "cmd": "echo $0" }));
    // As each of the published clients sends it, with and without `/api`.
    for path in [ours.path("/exec/run"), format!("/sandboxes/{}/exec/run", ours.id)] {
        for request in [
            run(path.clone()).bearer_auth(&token),
            run(path.clone()).header("x-api-key", &token),
            run(format!("{path}?token={token}")),
            run(format!("{path}?api_key={token}")),
        ] {
            rest.send(request).await?.expect(200)?;
        }
    }
    let refused = rest.send(run(other.path("/exec/run")).bearer_auth(&token)).await?;
    assert_eq!(refused.refusal(), (403, "WRONG_SANDBOX".into()));
    let refused = rest.send(rest.anonymous(Method::DELETE, &ours.path("")).bearer_auth(&token)).await?;
    assert_eq!(refused.refusal(), (403, "INVALID_CREDENTIALS".into()));
    let refused = rest
        .send(rest.anonymous(Method::POST, "/api/sandboxes").bearer_auth(&token).json(&json!({})))
        .await?;
    assert_eq!(refused.refusal(), (403, "INVALID_CREDENTIALS".into()));

    let refreshed =
        rest.send(rest.anonymous(Method::POST, &ours.path("/token/refresh")).bearer_auth(&token)).await?;
    let fresh = refreshed.expect(200)?.json()["token"].as_str().unwrap().to_owned();
    rest.send(run(ours.path("/exec/run")).bearer_auth(&fresh)).await?.expect(200)?;
    // A signature that was tampered with.
    let mut forged = token.clone().into_bytes();
    let last = forged.len() - 5;
    forged[last] = if forged[last] == b'A' { b'B' } else { b'A' };
    let refused = rest.send(run(ours.path("/exec/run")).bearer_auth(String::from_utf8(forged)?)).await?;
    assert_eq!(refused.refusal(), (403, "INVALID_CREDENTIALS".into()));
    ours.delete().await?;
    other.delete().await
}

pub async fn an_idle_sandbox_hibernates_by_itself(mesh: Arc<Mesh>) -> anyhow::Result<()> {
    let rest = mesh.rest();
    let (idle, busy) =
        (rest.create(json!({ "timeout": 2 })).await?, rest.create(json!({ "timeout": 5 })).await?);
    let working = {
        let busy = busy.clone();
        // A command that runs counts as use, however long nothing else is asked.
        tokio::spawn(async move { busy.run("sleep 10; echo done").await })
    };
    eventually("the idle sandbox hibernates", async || {
        let state = idle.get().await?.expect(200)?.json();
        ensure!(state["status"] == "hibernated", "{state}");
        Ok(())
    })
    .await?;
    assert_eq!(idle.run("echo awake").await?, "awake\n");
    // A wake keeps the timeout that was set.
    assert_eq!(idle.get().await?.json()["timeout"], 2);
    idle.delete().await?;
    assert_eq!(working.await??, "done\n");
    // The clock starts anew, and may be stopped.
    rest.post(&busy.path("/timeout"), json!({ "timeout": 0 })).await?.expect(204)?;
    tokio::time::sleep(Duration::from_secs(7)).await;
    busy.run("true").await?;
    assert!(busy.get().await?.json()["endAt"].is_null());
    busy.delete().await
}

pub async fn every_size_boots_and_has_what_it_says(mesh: Arc<Mesh>) -> anyhow::Result<()> {
    for (memory, cpus) in [(256, 1), (8192, 2)] {
        let sandbox = mesh.rest().create(json!({ "memoryMB": memory, "diskMB": 30720 })).await?;
        assert_eq!(sandbox.facts["cpuCount"], json!(cpus));
        assert_eq!(sandbox.facts["startPath"], "clone", "the first of its kind is a clone of a new snapshot");
        let text = sandbox.run("nproc; awk '/MemTotal/ {print int($2 / 1024)}' /proc/meminfo; df -m --output=size / | tail -1").await?;
        let numbers: Vec<i64> = text.split_whitespace().map(|number| number.parse().unwrap()).collect();
        let [found_cpus, found_memory, disk] = numbers[..] else { panic!("{text}") };
        assert_eq!(found_cpus, cpus);
        // The kernel takes its own part first.
        assert!((memory * 8 / 10..=memory).contains(&found_memory), "{found_memory} MiB of {memory}");
        assert!((29_000..=30_720).contains(&disk), "{disk} MiB of disk");
        sandbox.delete().await?;
    }
    Ok(())
}
