//! Commands: what they get, how they end, what becomes of their output.

use std::{sync::Arc, time::Instant};

use anyhow::ensure;
use oc_integration::mesh::{Mesh, eventually};
use serde_json::json;

pub async fn a_command_has_what_it_was_given(mesh: Arc<Mesh>) -> anyhow::Result<()> {
    let sandbox = mesh.rest().create(json!({ "envs": { "A": "sandbox's", "B": "sandbox's" } })).await?;
    let ran = sandbox
        .run_with(json!({
            "cmd": "python3",
            "args": ["-c", "import os, sys; print(os.getcwd(), os.environ['A'], os.environ['B'], sys.argv[1:], sys.stdin.read())", "a b", "$HOME", ""],
            "envs": { "B": "command's" },
            "cwd": "/var/tmp",
            "stdin": "input",
        }))
        .await?;
    assert_eq!(ran.stdout, "/var/tmp sandbox's command's ['a b', '$HOME', ''] input\n", "{}", ran.stderr);
    // Without arguments it is a script; relative directories start at the user's home.
    assert_eq!(sandbox.run("mkdir -p deep/er && echo $((40 + 2)) | tee deep/er/x").await?, "42\n");
    assert_eq!(sandbox.run_with(json!({ "cmd": "cat x", "cwd": "deep/er" })).await?.stdout, "42\n");
    assert_eq!(sandbox.run_as_root("echo $(id -un) $HOME $(pwd)").await?, "root /root /root\n");
    assert_eq!(
        sandbox
            .run("id -un; id -Gn; umask; cat /proc/self/status | grep -E '^(SigBlk|SigIgn|CapEff)'")
            .await?
            .lines()
            .collect::<Vec<_>>(),
        [
            "sandbox",
            "sandbox sudo",
            "0022",
            "SigBlk:\t0000000000000000",
            // Signals 32 and 33 are the C library's own; it ignores them in whatever `posix_spawn` starts.
            "SigIgn:\t0000000180000000",
            "CapEff:\t0000000000000000",
        ]
    );
    // Nothing of the first process is inherited but the three streams, and the command leads a session of its own.
    assert_eq!(
        sandbox.run("ls /proc/self/fd | wc -l; [ $(ps -o sid= -p $$) -eq $$ ] && echo leads").await?,
        "4\nleads\n"
    );
    sandbox.delete().await
}

pub async fn a_command_ends_as_it_ends(mesh: Arc<Mesh>) -> anyhow::Result<()> {
    let sandbox = mesh.rest().create(json!({})).await?;
    for (script, code) in [("exit 3", 3), ("kill -9 $$", 137), ("kill -TERM $$", 143), ("true", 0)] {
        assert_eq!(sandbox.run_with(json!({ "cmd": script })).await?.code, code, "{script}");
    }
    // Orphans are collected by the first process: none is left a zombie.
    sandbox.run("for i in $(seq 50); do (sh -c 'exit 0' &) ; done; sleep 0.5").await?;
    eventually("no zombie is left", async || {
        let zombies = sandbox.run("ps -eo stat= | grep -c '^Z' || true").await?;
        ensure!(zombies == "0\n", "{zombies}");
        Ok(())
    })
    .await?;
    sandbox.delete().await
}

pub async fn a_timeout_kills_the_commands_group_alone(mesh: Arc<Mesh>) -> anyhow::Result<()> {
    let sandbox = mesh.rest().create(json!({})).await?;
    let neighbour = {
        let sandbox = sandbox.clone();
        tokio::spawn(async move { sandbox.run("sleep 8; echo lives").await })
    };
    let ran = sandbox
        .run_with(json!({ "cmd": "echo begun; (trap '' TERM; sleep 77) & sleep 77", "timeout": 5 }))
        .await?;
    assert_eq!((ran.code, ran.stdout.as_str()), (-1, "begun\n"));
    assert_eq!(ran.all["timedOut"], true);
    assert!(ran.stderr.ends_with("oc: killed after the timeout of 5 s\n"), "{}", ran.stderr);
    assert_eq!(sandbox.run("pgrep -fc '[s]leep 77' || true").await?, "0\n");
    assert_eq!(neighbour.await??, "lives\n");
    sandbox.delete().await
}

pub async fn what_a_command_leaves_running_runs_on(mesh: Arc<Mesh>) -> anyhow::Result<()> {
    let sandbox = mesh.rest().create(json!({})).await?;
    let begun = Instant::now();
    // It holds the output's pipe open, and is not waited for. What it writes appears whole, by renaming.
    let beats = "(while :; do date +%s > next; mv next beat; sleep 0.2; done) & echo left";
    let out = sandbox.run(beats).await?;
    assert_eq!(out, "left\n");
    assert!(begun.elapsed().as_secs() < 30, "its end was waited for");
    let beat = sandbox.run("sleep 1; cat beat").await?;
    eventually("it runs on", async || {
        let later = sandbox.run("sleep 1.5; cat beat").await?;
        ensure!(later > beat, "{later} after {beat}");
        Ok(())
    })
    .await?;
    sandbox.delete().await
}

pub async fn output_is_exact_and_bounded(mesh: Arc<Mesh>) -> anyhow::Result<()> {
    use base64::Engine as _;
    let sandbox = mesh.rest().create(json!({})).await?;
    let ran = sandbox.run_with(json!({ "cmd": r"printf 'a\377b\0c\303\251'; printf 'oops' >&2" })).await?;
    assert_eq!((ran.stdout.as_str(), ran.stderr.as_str()), ("a\u{fffd}b\0cé", "oops"));
    let exact =
        base64::engine::general_purpose::STANDARD.decode(ran.all["stdoutBase64"].as_str().unwrap())?;
    assert_eq!(exact, b"a\xffb\0c\xc3\xa9");
    assert_eq!(ran.all["truncated"], false);

    let ran = sandbox
        .run_with(json!({ "cmd": "head -c 104857600 /dev/zero | tr '\\0' x; printf END", "timeout": 120 }))
        .await?;
    assert_eq!((ran.code, ran.all["truncated"].as_bool()), (0, Some(true)));
    assert_eq!(ran.all["stdoutBytes"], json!(104_857_603));
    assert_eq!(ran.stdout.len(), 4 << 20);
    assert!(ran.stdout.ends_with("xxxEND"), "the end is what is kept");
    sandbox.delete().await
}

pub async fn a_long_command_keeps_its_client_waiting(mesh: Arc<Mesh>) -> anyhow::Result<()> {
    let sandbox = mesh.rest().create(json!({})).await?;
    let answer = sandbox.exec(json!({ "cmd": "sleep 12; echo done", "timeout": 60 })).await?.expect(200)?;
    assert!(answer.body.starts_with(b" "), "the answer begins before the command ends");
    assert_eq!(answer.json()["stdout"], "done\n");
    sandbox.delete().await
}

pub async fn many_commands_run_at_once(mesh: Arc<Mesh>) -> anyhow::Result<()> {
    let sandbox = mesh.rest().create(json!({})).await?;
    let runs = (0..40).map(|number| {
        let sandbox = sandbox.clone();
        tokio::spawn(async move { sandbox.run(&format!("sleep 1; echo {number}")).await })
    });
    for (number, run) in runs.collect::<Vec<_>>().into_iter().enumerate() {
        assert_eq!(run.await??, format!("{number}\n"));
    }
    // Beyond the bound it says so, and goes on afterwards.
    let runs = (0..80).map(|_| {
        let sandbox = sandbox.clone();
        tokio::spawn(async move { sandbox.exec(json!({ "cmd": "sleep 20" })).await })
    });
    let mut refused = 0;
    for run in runs.collect::<Vec<_>>() {
        let answer = run.await??;
        if answer.status != 200 {
            assert_eq!(answer.refusal(), (503, "OVERLOADED".into()));
            assert!(answer.headers.contains_key("retry-after"));
            refused += 1;
        }
    }
    assert!(refused >= 16, "{refused} of 80 were refused where 64 run at once");
    sandbox.run("true").await?;
    sandbox.delete().await
}

pub async fn the_first_process_survives_what_is_done_to_it(mesh: Arc<Mesh>) -> anyhow::Result<()> {
    let sandbox = mesh.rest().create(json!({ "memoryMB": 512 })).await?;
    sandbox.run_as_root("kill -9 1; kill -TERM 1; kill -SEGV 1; kill -STOP 1").await?;
    // More memory than there is: the kernel ends whoever wants it, not the first process.
    let ran = sandbox
        .run_with(
            json!({ "cmd": "python3", "args": ["-c", "x = [bytearray(1 << 20) for _ in range(4096)]"] }),
        )
        .await?;
    assert_ne!(ran.code, 0);
    // A user has no more processes than the guest has MiB of memory, so a fork bomb ends somewhere; it harms its own
    // sandbox at most, which can be deleted all the same.
    let bound: u32 = sandbox.run("bash -c 'ulimit -u'").await?.trim().parse()?;
    assert!((256..=512).contains(&bound), "{bound}");
    let neighbour = mesh.rest().create(json!({})).await?;
    sandbox.run_with(json!({ "cmd": "f() { f | f & }; f", "timeout": 5 })).await?;
    assert_eq!(neighbour.run("echo works").await?, "works\n");
    neighbour.delete().await?;
    sandbox.delete().await
}
