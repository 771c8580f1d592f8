//! One mesh in which something dies at a named step, again and again, and a sandbox that this happens to.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    path::PathBuf,
    time::Duration,
};

use anyhow::{Context as _, bail, ensure};
use oc_integration::{
    mesh::{Mesh, eventually},
    processes,
    rest::{Answer, Rest, Sandbox},
};
use oc_mesh::fail::{Point, VARIABLE, passed};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::time::{Instant, sleep};

/// A step that is done in the background follows the answer by less than this.
const FOLLOWS_WITHIN: Duration = Duration::from_secs(6);
const LOOKS_EVERY: Duration = Duration::from_millis(20);

/// What happens at a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// The vmm-agent is killed.
    Agent,
    /// The scheduler is.
    Scheduler,
    /// The VMM at hand is.
    Vmm,
    /// The step fails.
    Error,
}

impl Fault {
    /// What it is called.
    pub fn name(self) -> &'static str {
        match self {
            Self::Agent => "agent",
            Self::Scheduler => "scheduler",
            Self::Vmm => "VMM",
            Self::Error => "error",
        }
    }

    fn action(self) -> &'static str {
        match self {
            Self::Agent | Self::Scheduler => "kill",
            Self::Vmm => "kill-vmm",
            Self::Error => "fail",
        }
    }

    /// The service that dies.
    fn service(self) -> Option<&'static str> {
        match self {
            Self::Agent => Some("vmm-agent"),
            Self::Scheduler => Some("scheduler"),
            Self::Vmm | Self::Error => None,
        }
    }
}

/// What a sandbox is found to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Found {
    /// The same process, with this mark in memory and on disk alike.
    Whole(u32),
    /// Booted from its disk, which has this mark, and its record says so.
    Disk(u32),
    /// Its VMM is lost, and its record says so.
    Lost,
}

/// The sandbox that it happens to.
#[derive(Clone, Debug)]
pub struct Subject {
    /// The sandbox.
    pub sandbox: Sandbox,
    /// Its process that is always there.
    pub pid: String,
}

impl Subject {
    /// What a sandbox that is of this one's state is, as soon as it can be used.
    pub async fn look(&self, sandbox: &Sandbox) -> anyhow::Result<Found> {
        eventually("it is used again", async || {
            let look = "cat disk; cat /dev/shm/memory /dev/shm/pid && kill -0 $(cat /dev/shm/pid)";
            let answer = sandbox.exec(json!({ "cmd": look })).await?;
            if answer.refusal() == (410, "SANDBOX_FAILED".into()) {
                let facts = sandbox.get().await?.expect(200)?.json();
                ensure!(facts["status"] == "failed", "{facts}");
                return Ok(Found::Lost);
            }
            let ran = answer.expect(200)?.json();
            let text = ran["stdout"].as_str().unwrap_or_default().to_owned();
            let words: Vec<_> = text.split_whitespace().collect();
            match words[..] {
                [disk, memory, pid] if ran["exitCode"] == 0 => {
                    assert_eq!((disk, pid), (memory, self.pid.as_str()), "{}: in between", sandbox.id);
                    Ok(Found::Whole(disk.parse()?))
                }
                [disk] => {
                    let path = sandbox.get().await?.expect(200)?.json()["startPath"].clone();
                    assert_eq!(path, "disk", "{}: its memory is gone, and nobody says so", sandbox.id);
                    Ok(Found::Disk(disk.parse()?))
                }
                _ => bail!("{ran}"),
            }
        })
        .await
    }
}

/// A mesh with one sandbox.
#[derive(Debug)]
pub struct Bed {
    pub mesh: Mesh,
    directory: TempDir,
    subject: Option<Subject>,
    mark: u32,
    /// Clones that wait in the pool.
    pub pool: usize,
}

impl Bed {
    /// Does `body` in a mesh with so many clones in its pool, started with these options, which leaves nothing behind.
    ///
    /// # Errors
    ///
    /// What went wrong, with the ends of the logs.
    pub async fn with(
        pool: usize,
        options: &[&str],
        body: impl AsyncFnOnce(&mut Self) -> anyhow::Result<()>,
    ) -> anyhow::Result<()> {
        let mut bed = Self::start(pool, options)?;
        let mut done = body(&mut bed).await;
        if done.is_ok() {
            done = bed.end().await;
        }
        match done {
            Ok(()) => bed.mesh.stop(),
            Err(error) => bail!("{error:#}\n{}", bed.mesh.logs()),
        }
    }

    fn start(pool: usize, options: &[&str]) -> anyhow::Result<Self> {
        let directory = tempfile::tempdir()?;
        let file = directory.path().join("point");
        let size = pool.to_string();
        let options = [&["--pool-size", size.as_str()], options].concat();
        let mesh = Mesh::start_in(None, &options, &[(VARIABLE, &file.display().to_string())])?;
        Ok(Self { mesh, directory, subject: None, mark: 0, pool })
    }

    /// REST.
    pub fn rest(&self) -> Rest {
        self.mesh.rest()
    }

    fn file(&self) -> PathBuf {
        self.directory.path().join("point")
    }

    /// A sandbox that runs, with a new mark in memory and on disk.
    pub async fn begin(&mut self) -> anyhow::Result<(Subject, u32)> {
        self.mark += 1;
        let subject = match self.subject.take() {
            Some(subject) => subject,
            None => {
                let rest = self.rest();
                let made = async || rest.create(json!({ "timeout": 0 })).await;
                let sandbox = eventually("a new sandbox", made).await?;
                let script =
                    "(while :; do sleep 1; done) > /dev/null 2>&1 & echo $! > /dev/shm/pid; cat /dev/shm/pid";
                let pid = sandbox.run(script).await?.trim().to_owned();
                Subject { sandbox, pid }
            }
        };
        let mark = self.mark;
        let script = format!("echo {mark} > /dev/shm/memory; echo {mark} > disk; sync");
        eventually("its mark", async || subject.sandbox.run(&script).await).await?;
        self.subject = Some(subject.clone());
        Ok((subject, mark))
    }

    /// Asks until the point is passed, and waits until whoever died there is replaced. What was answered last, if that was
    /// no refusal.
    pub async fn strike(
        &mut self,
        (point, fault): (Point, Fault),
        ask: impl AsyncFn() -> anyhow::Result<Answer>,
    ) -> anyhow::Result<Option<Value>> {
        let file = self.file();
        let before = match fault.service() {
            Some(service) => Some((service, self.mesh.running_pid(service).await?)),
            None => None,
        };
        drop(self.write(point, fault.action())?);
        let answer = eventually(&format!("{} is passed", point.name()), async || {
            let answer = ask().await;
            let is_done = answer.as_ref().is_ok_and(|answer| answer.status < 300);
            let until = Instant::now() + if is_done { FOLLOWS_WITHIN } else { Duration::ZERO };
            while !passed(&file).exists() && Instant::now() < until {
                sleep(LOOKS_EVERY).await;
            }
            ensure!(passed(&file).exists(), "not passed; the last answer is {answer:?}");
            Ok(answer.ok().filter(|_| is_done))
        })
        .await?;
        fs::remove_file(passed(&file))?;
        if let Some((service, killed)) = before {
            let replaced = async || {
                ensure!(self.mesh.pid(service)? != killed, "the {service} is not replaced yet");
                Ok(())
            };
            eventually("it is replaced", replaced).await?;
        }
        Ok(answer.map(|answer| answer.json()))
    }

    /// Has whoever passes the point wait there.
    pub fn hold(&self, point: Point) -> anyhow::Result<Held> {
        Ok(Held { _lock: self.write(point, "pause")?, passed: passed(&self.file()) })
    }

    /// Says what is to happen at a point. The file is locked as long as the answer is there.
    fn write(&self, point: Point, action: &str) -> anyhow::Result<File> {
        let draft = self.file().with_extension("new");
        fs::write(&draft, format!("{}={action}", point.name()))?;
        let file = File::open(&draft)?;
        file.lock()?;
        // As a whole.
        fs::rename(&draft, self.file())?;
        Ok(file)
    }

    /// What the sandbox is found to be now. One that is lost, or whose memory is, is deleted.
    pub async fn find(&mut self) -> anyhow::Result<Found> {
        let subject = self.subject.clone().context("no sandbox")?;
        let found = subject.look(&subject.sandbox).await?;
        // One of which less is left is no good for what follows.
        if !matches!(found, Found::Whole(_)) {
            subject.sandbox.delete().await?;
            self.subject = None;
        }
        Ok(found)
    }

    /// The VMMs that run.
    pub fn vmms(&self) -> Vec<i32> {
        processes::vmms(self.mesh.state()).into_iter().map(|vmm| vmm.pid).collect()
    }

    /// What it is found to be, in words; of one that runs on also whether its VMM is that of `before`.
    pub fn told(&self, found: Found, before: &[i32]) -> String {
        match found {
            Found::Whole(_) if self.vmms() == before => format!("{found:?}, the same VMM"),
            Found::Whole(_) => format!("{found:?}, another VMM"),
            // It is deleted by now.
            Found::Disk(_) | Found::Lost => format!("{found:?}"),
        }
    }

    /// Every checkpoint that there is, by ID, once all are settled.
    pub async fn checkpoints(&self) -> anyhow::Result<BTreeMap<String, Value>> {
        let rest = self.rest();
        eventually("settled checkpoints", async || {
            let listed = rest.get("/api/checkpoints?pageSize=1000").await?.expect(200)?.json();
            let listed = listed.as_array().context("no list")?.iter();
            let all: BTreeMap<_, _> =
                listed.map(|one| (one["id"].as_str().unwrap_or_default().to_owned(), one.clone())).collect();
            ensure!(all.values().all(|one| one["status"] == "ready"), "{all:?}");
            Ok(all)
        })
        .await
    }

    /// Sees that a checkpoint is whole, and that what is made of it is of this state.
    pub async fn is_good(&self, subject: &Subject, id: &str, mark: u32) -> anyhow::Result<()> {
        let rest = self.rest();
        let path = |what: &str| format!("/api/checkpoints/{id}/{what}");
        eventually("it is whole", async || rest.post(&path("verify"), json!({})).await?.expect(200)).await?;
        let asked = json!({ "mode": "live" });
        let made = eventually("something is made of it", async || {
            Ok(rest.post(&path("fork"), asked.clone()).await?.expect(201)?.json())
        })
        .await?;
        let fork = rest.sandbox(made["sandboxes"][0]["sandboxID"].as_str().context("no fork")?);
        ensure!(subject.look(&fork).await? == Found::Whole(mark), "{id} is not of the state {mark}");
        fork.delete().await
    }

    /// Sees that only the sandbox is left, deletes it and every checkpoint, and sees that nothing is left behind.
    async fn end(&mut self) -> anyhow::Result<()> {
        let rest = self.rest();
        for id in self.checkpoints().await?.keys() {
            rest.delete(&format!("/api/checkpoints/{id}")).await?.expect(204)?;
        }
        let subject = self.subject.take();
        let kept = subject.as_ref().map(|subject| subject.sandbox.id.clone());
        eventually("only the sandbox is left", async || {
            // What was made, and never answered.
            for other in rest.list().await?.into_iter().filter(|id| Some(id) != kept.as_ref()) {
                rest.sandbox(&other).delete().await?;
            }
            let (listed, vmms) = (rest.list().await?.len(), processes::vmms(self.mesh.state()).len());
            let expected = usize::from(kept.is_some());
            ensure!(listed == expected && vmms == expected + self.pool, "{listed} sandboxes, {vmms} VMMs");
            Ok(())
        })
        .await?;
        if let Some(subject) = subject {
            subject.sandbox.delete().await?;
        }
        eventually("nothing is left on disk", async || {
            let (snapshots, homes) = (self.names("snapshots")?, self.names("vms")?);
            ensure!(snapshots.is_empty() && homes.len() == self.pool, "{snapshots:?}, {homes:?}");
            Ok(())
        })
        .await
    }

    /// What is in a directory of the agent's.
    fn names(&self, place: &str) -> anyhow::Result<Vec<String>> {
        let entries = fs::read_dir(self.mesh.state().join("agent").join(place))?;
        Ok(entries.flatten().map(|entry| entry.path().display().to_string()).collect())
    }
}

/// Waits until so many clones are said to wait. They may have been taken since that was told.
pub async fn pool_is_ready(rest: &Rest, pool: usize) -> anyhow::Result<()> {
    eventually("the pool is ready", async || {
        let nodes = rest.get("/api/nodes").await?.expect(200)?.json();
        ensure!(nodes[0]["poolReady"].as_u64() == Some(pool as u64), "{nodes}");
        Ok(())
    })
    .await
}

/// Whoever passes a point waits there as long as this is there.
#[derive(Debug)]
pub struct Held {
    _lock: File,
    passed: PathBuf,
}

impl Held {
    /// Waits until somebody waits there.
    pub async fn reached(&self) -> anyhow::Result<()> {
        let look = async || Ok(fs::remove_file(&self.passed)?);
        eventually("the point is reached", look).await
    }
}

/// Tells what became of it.
pub fn row(operation: &str, point: Point, fault: &str, outcome: &str) {
    eprintln!("{operation:<10} {:<28} {fault:<9} {outcome}", point.name());
}
