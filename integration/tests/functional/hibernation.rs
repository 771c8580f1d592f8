//! Sandboxes that sleep, and what they find when they wake.

use std::{
    collections::BTreeSet,
    path::{Path, PathBuf},
    process::Command,
    sync::Arc,
    time::{SystemTime, UNIX_EPOCH},
};

use anyhow::{Context as _, ensure};
use futures_util::future::try_join_all;
use oc_integration::{
    mesh::{Mesh, eventually, succeeded},
    processes,
    rest::{Rest, Sandbox},
};
use reqwest::Method;
use serde_json::{Value, json};

/// A process that holds a deleted file open and something in its memory only, and says once in a while how far it is.
pub const WITNESS: &str = "\
import os, time
held = open('held', 'w+'); os.remove('held')
secret, beats = os.urandom(16).hex(), 0
while True:
    held.write(f'{beats}\\n'); held.flush()
    with open('next', 'w') as out: print(os.getpid(), secret, beats, file=out)
    os.rename('next', 'witness')
    beats += 1
    time.sleep(0.05)
";

pub async fn hibernate(rest: &Rest, sandbox: &Sandbox) -> anyhow::Result<Value> {
    Ok(rest.post(&sandbox.path("/hibernate"), json!({})).await?.expect(200)?.json())
}

pub async fn wake(rest: &Rest, sandbox: &Sandbox) -> anyhow::Result<Value> {
    Ok(rest.post(&sandbox.path("/wake"), json!({})).await?.expect(200)?.json())
}

/// The homes of VMs that are there now.
fn homes(mesh: &Mesh) -> anyhow::Result<BTreeSet<PathBuf>> {
    let entries = std::fs::read_dir(mesh.state().join("agent/vms"))?;
    Ok(entries.filter_map(|entry| Some(entry.ok()?.path())).collect())
}

/// The home of the one VM of which nothing but what is stored is left, among those that wait for `sandbox`'s host.
fn home_of_stored(mesh: &Mesh, sandbox: &Sandbox) -> anyhow::Result<PathBuf> {
    let journal = mesh.state().join("agent/journal");
    let is_of = |home: &Path| {
        let name = home.file_name().unwrap_or_default().to_string_lossy();
        let record = std::fs::read_to_string(journal.join(format!("{name}.json"))).unwrap_or_default();
        record.contains(&sandbox.id) && record.contains("hibernated")
    };
    homes(mesh)?.into_iter().find(|home| is_of(home)).context("no VM of that sandbox is stored")
}

/// Hibernates, and waits until nothing is left but what is stored; returns its home.
async fn store(mesh: &Mesh, sandbox: &Sandbox) -> anyhow::Result<PathBuf> {
    hibernate(&mesh.rest(), sandbox).await?;
    eventually("it is stored, and has no process", async || {
        let home = home_of_stored(mesh, sandbox)?;
        let left = processes::naming(&home.display().to_string());
        ensure!(left.is_empty(), "its VMM still runs: {left:?}");
        Ok(home)
    })
    .await
}

/// Process, secret and beat of the witness.
pub async fn witness(sandbox: &Sandbox) -> anyhow::Result<(String, String, u64)> {
    let text = sandbox.run("cat witness").await?;
    let words: Vec<_> = text.split_whitespace().map(str::to_owned).collect();
    let [pid, secret, beats] = &words[..] else { anyhow::bail!("{text}") };
    Ok((pid.clone(), secret.clone(), beats.parse()?))
}

/// What is stored of a sandbox's memory.
pub fn stored_bytes(facts: &Value) -> u64 {
    let bytes = &facts["storedBytes"];
    bytes.as_u64().or_else(|| bytes.as_str()?.parse().ok()).unwrap_or_default()
}

pub async fn a_sandbox_wakes_where_it_was(mesh: Arc<Mesh>) -> anyhow::Result<()> {
    let rest = mesh.rest();
    let sandbox = rest.create(json!({ "timeout": 77, "envs": { "A": "kept" } })).await?;
    sandbox.put("witness.py", WITNESS).await?.expect(204)?;
    sandbox.run("python3 witness.py > /dev/null 2>&1 & echo in memory > /dev/shm/file").await?;
    eventually("the witness writes", async || witness(&sandbox).await).await?;
    for _ in 0..3 {
        let (pid, secret, beats) = witness(&sandbox).await?;
        let stored = hibernate(&rest, &sandbox).await?;
        assert_eq!((&stored["sandboxID"], &stored["status"]), (&json!(sandbox.id), &json!("hibernated")));
        // Again is fine, and nothing but files is left on the host after a while.
        store(&mesh, &sandbox).await?;
        eventually("what is stored is told", async || {
            let facts = sandbox.get().await?.expect(200)?.json();
            ensure!(facts["status"] == "hibernated" && stored_bytes(&facts) > 0, "{facts}");
            Ok(())
        })
        .await?;

        let woken = wake(&rest, &sandbox).await?;
        assert_eq!((&woken["sandboxID"], &woken["status"]), (&json!(sandbox.id), &json!("running")));
        assert_eq!((&woken["startPath"], &woken["timeout"]), (&json!("memory"), &json!(77)));
        assert_eq!(wake(&rest, &sandbox).await?["status"], "running", "waking one that runs is fine");
        eventually("the witness goes on", async || {
            let (same, known, now) = witness(&sandbox).await?;
            assert_eq!((&same, &known), (&pid, &secret), "it is another process");
            ensure!(now > beats, "beat {now} after {beats}");
            Ok(())
        })
        .await?;
        let last = format!("tail -n 1 /proc/{pid}/fd/3");
        assert!(sandbox.run(&last).await?.trim().parse::<u64>()? >= beats, "its deleted file is open");
        assert_eq!(sandbox.run("cat /dev/shm/file; echo $A").await?, "in memory\nkept\n");
        knows_the_time(&sandbox).await?;
    }
    sandbox.delete().await
}

/// Its clock is right, give or take what telling it takes on a busy host.
pub async fn knows_the_time(sandbox: &Sandbox) -> anyhow::Result<()> {
    let now = || SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs_f64();
    let before = now();
    let guest: f64 = sandbox.run("date +%s.%N").await?.trim().parse()?;
    let after = now();
    assert!((before - 2.0..=after + 2.0).contains(&guest), "{guest} is not between {before} and {after}");
    Ok(())
}

pub async fn any_call_wakes_a_sandbox(mesh: Arc<Mesh>) -> anyhow::Result<()> {
    let rest = mesh.rest();
    let sandbox = rest.create(json!({})).await?;
    sandbox.put("file", "content").await?.expect(204)?;
    hibernate(&rest, &sandbox).await?;
    let calls = (0..20).map(|number| {
        let sandbox = sandbox.clone();
        async move { sandbox.run(&format!("cat file; echo {number}")).await }
    });
    for (number, answer) in try_join_all(calls).await?.into_iter().enumerate() {
        assert_eq!(answer, format!("content{number}\n"));
    }
    hibernate(&rest, &sandbox).await?;
    assert_eq!(sandbox.read("file").await?.expect(200)?.body, "content");
    hibernate(&rest, &sandbox).await?;
    sandbox.put("other", "more").await?.expect(204)?;
    hibernate(&rest, &sandbox).await?;
    // Who asks for it is told to come again instead of being made to wait.
    let asks = || {
        let request = rest.request(Method::POST, &sandbox.path("/exec/run"));
        rest.send(request.header("x-osb-async-wake", "1").json(&json!({ "cmd": "cat other" })))
    };
    let told = asks().await?;
    assert_eq!(told.refusal(), (503, "SANDBOX_WAKING".into()));
    assert_eq!(told.json()["waking"], true);
    assert!(told.headers.contains_key("retry-after"));
    eventually("it has woken", async || {
        ensure!(asks().await?.expect(200)?.json()["stdout"] == "more");
        Ok(())
    })
    .await?;
    sandbox.delete().await?;
    for route in ["/hibernate", "/wake"] {
        let refused = rest.post(&sandbox.path(route), json!({})).await?;
        assert_eq!(refused.refusal(), (410, "SANDBOX_DELETED".into()), "{route}");
        let unknown = rest.sandbox("sb-00000000000000000000");
        assert_eq!(rest.post(&unknown.path(route), json!({})).await?.status, 404, "{route}");
    }
    Ok(())
}

pub async fn a_call_under_way_is_told_that_its_sandbox_sleeps(mesh: Arc<Mesh>) -> anyhow::Result<()> {
    let rest = mesh.rest();
    let sandbox = rest.create(json!({})).await?;
    let running = {
        let sandbox = sandbox.clone();
        tokio::spawn(async move { sandbox.exec(json!({ "cmd": "touch begun; sleep 60" })).await })
    };
    eventually("the command runs", async || sandbox.run("test -e begun").await.map(drop)).await?;
    hibernate(&rest, &sandbox).await?;
    assert_eq!(running.await??.refusal(), (409, "INTERRUPTED".into()));
    sandbox.delete().await
}

pub async fn damaged_memory_leads_to_a_boot_from_the_disk(mesh: Arc<Mesh>) -> anyhow::Result<()> {
    let rest = mesh.rest();
    let sandbox = rest.create(json!({ "envs": { "A": "kept" } })).await?;
    for part in ["pages.bin", "state.bin", "manifest.json", "memory.digests"] {
        // Not synced: what is stored holds it all the same.
        sandbox.run(&format!("echo {part} > on-disk; echo {part} > /dev/shm/in-memory")).await?;
        let damaged = store(&mesh, &sandbox).await?.join("stored").join(part);
        let mut bytes = std::fs::read(&damaged)?;
        let middle = bytes.len() / 2;
        bytes[middle] ^= 0x55;
        std::fs::write(&damaged, bytes)?;
        let woken = wake(&rest, &sandbox).await?;
        assert_eq!(woken["startPath"], "disk", "{part}");
        assert_eq!(sandbox.run("cat on-disk; echo $A").await?, format!("{part}\nkept\n"));
        assert_eq!(sandbox.run("ls /dev/shm").await?, "", "its memory is gone");
        // It is one like any other from then on.
        store(&mesh, &sandbox).await?;
        assert_eq!(wake(&rest, &sandbox).await?["startPath"], "memory", "{part}");
    }
    sandbox.delete().await
}

/// How often writers are interrupted: a few times here, and as often as `OC_TORTURE_ROUNDS` asks for (`make torture`).
pub fn rounds(few: usize) -> anyhow::Result<usize> {
    let asked = std::env::var("OC_TORTURE_ROUNDS").ok();
    Ok(asked.map(|text| text.parse()).transpose()?.unwrap_or(few))
}

/// Starts the writers, and waits until each has written something.
pub async fn start_writers(sandbox: &Sandbox) -> anyhow::Result<()> {
    sandbox.run(WRITERS).await?;
    eventually("all of them write", async || {
        let written = verify_writers(sandbox).await?;
        ensure!(written[1..].iter().all(|count| *count > 0), "{written:?}");
        Ok(())
    })
    .await
}

/// How many processes there are of them, and how far each has come; fails if anything is not whole.
pub async fn verify_writers(sandbox: &Sandbox) -> anyhow::Result<Vec<u64>> {
    let verified = sandbox.run_with(json!({ "cmd": VERIFY, "timeout": 300 })).await?;
    let said = format!("{}{}", verified.stdout, verified.stderr);
    ensure!(verified.code == 0, "{said}");
    let counts: Result<Vec<u64>, _> = verified.stdout.split_whitespace().map(str::parse).collect();
    let counts = counts.with_context(|| said.clone())?;
    ensure!(counts.len() == 4, "{said}");
    Ok(counts)
}

/// Sees that a disk that nobody writes to is clean.
pub fn check_disk(layer: &Path) -> anyhow::Result<()> {
    let mut check = Command::new("e2fsck");
    check.args(["-n", "-f"]).arg(layer);
    succeeded(check).map(drop)
}

/// Writes to a database, a repository and a log as fast as it can, and says of the log how far it is on disk. Whoever verifies it goes
/// first: the guest has one processor.
const WRITERS: &str = r#"
mkdir -p repository && cd repository && git init -q . && git config user.email a@b && git config user.name a && cd ..
cat > database.py <<'END'
import sqlite3
db = sqlite3.connect('data.db', isolation_level=None)
db.execute('PRAGMA journal_mode=WAL')
db.execute('CREATE TABLE IF NOT EXISTS t (n INTEGER PRIMARY KEY, text TEXT)')
n = 0
while True:
    n += 1
    db.execute('BEGIN'); db.execute('INSERT INTO t VALUES (?, ?)', (n, 'x' * (n % 4000))); db.execute('COMMIT')
    if n % 50 == 0: db.execute('PRAGMA wal_checkpoint(TRUNCATE)')
END
cat > log.py <<'END'
import hashlib, os
log, n = open('log', 'ab', 0), 0
while True:
    body = f'{n} '.encode() + os.urandom(600).hex().encode()
    log.write(body + b' ' + hashlib.sha256(body).hexdigest().encode() + b'\n'); os.fsync(log.fileno()); n += 1
END
cat > commits.sh <<'END'
cd repository
n=0; while :; do
    n=$((n + 1)); echo $n > file$((n % 20)); flock ../lock sh -c "git add -A && git commit -qm $n" || exit 1
done
END
for job in 'python3 database.py' 'python3 log.py' 'sh commits.sh'; do setsid nice -n 19 $job > errors.${job##* } 2>&1 & done
"#;

/// What each writer has done; fails if anything of it is not whole.
const VERIFY: &str = r#"
cat errors.*; pgrep -f 'database.py|log.py|commits.sh' | wc -l
cat > verify.py <<'END'
import hashlib, sqlite3
db = sqlite3.connect('data.db', timeout=60)
assert db.execute('PRAGMA integrity_check').fetchone() == ('ok',)
count, last = db.execute('SELECT count(*), max(n) FROM t').fetchone()
assert count == last, (count, last)
lines = open('log', 'rb').read().split(b'\n')[:-1]
for number, line in enumerate(lines):
    body, digest = line.rsplit(b' ', 1)
    assert hashlib.sha256(body).hexdigest().encode() == digest and body.startswith(b'%d ' % number), number
print(count, len(lines))
END
# git takes what is committed while it looks for missing.
python3 verify.py && flock lock git -C repository fsck --strict --no-progress --no-dangling && git -C repository rev-list --count HEAD
"#;

pub async fn writers_lose_nothing_however_often_their_sandbox_sleeps(mesh: Arc<Mesh>) -> anyhow::Result<()> {
    let rest = mesh.rest();
    let sandbox = rest.create(json!({})).await?;
    start_writers(&sandbox).await?;
    let mut before = Vec::new();
    for round in 0..rounds(3)? {
        tokio::time::sleep(std::time::Duration::from_millis(700)).await;
        if round % 2 == 0 {
            let layer = store(&mesh, &sandbox).await?.join("layer.img");
            check_disk(&layer).with_context(|| format!("the stored disk of round {round}"))?;
            assert_eq!(wake(&rest, &sandbox).await?["startPath"], "memory", "round {round}");
        } else {
            // Of whatever tier it is by then.
            hibernate(&rest, &sandbox).await?;
            assert_ne!(wake(&rest, &sandbox).await?["startPath"], "disk", "round {round}");
        }
        let counts = verify_writers(&sandbox).await.with_context(|| format!("round {round}"))?;
        // The three of them, and who looks for them.
        assert!(counts[0] >= 4, "round {round}: the writers write: {counts:?}");
        assert!(before.iter().zip(&counts[1..]).all(|(before, now)| before < now), "{before:?} {counts:?}");
        before = counts[1..].to_vec();
    }
    sandbox.delete().await
}
