//! Live streams through the gateway's WebSocket: throughput, memory under a slow reader, echo, and idle attachments.

use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use futures_util::{SinkExt as _, StreamExt as _, future::try_join_all};
use oc_integration::{
    mesh::Mesh,
    processes,
    rest::Sandbox,
    websocket::{self, Socket},
};
use serde_json::json;
use tokio::time::{sleep, timeout};
use tokio_tungstenite::tungstenite::Message;

use crate::{
    memory::mib,
    table::{Table, Target, median, ms_since, quantile},
};

const BULK_MIB: usize = 200;
const ROUNDS: usize = 5;
const KEYS: usize = 500;
/// Between two keystrokes: nobody types faster.
const PAUSE: Duration = Duration::from_millis(10);
const SLOW_FOR: Duration = Duration::from_secs(20);
/// Idle attachments, and over how many sandboxes: one takes 256 calls at a time.
const IDLE: usize = 10_000;
const SANDBOXES: usize = 40;
const IDLE_FOR: Duration = Duration::from_secs(20);

pub async fn measure(mesh: &Mesh, table: &mut Table) -> anyhow::Result<()> {
    let sandbox = mesh.rest().create(json!({ "timeout": 0 })).await?;
    throughput(mesh, &sandbox, table).await.context("throughput")?;
    slow_reader(mesh, &sandbox, table).await.context("a slow reader")?;
    echo(mesh, &sandbox, table).await.context("echo")?;
    sandbox.delete().await
}

/// Starts a script and attaches; it begins with its first line of input.
async fn attached(mesh: &Mesh, sandbox: &Sandbox, script: &str) -> anyhow::Result<Socket> {
    let args = ["-c".to_owned(), format!("read begin; {script}")];
    let made = mesh.rest().post(&sandbox.path("/exec"), json!({ "cmd": "sh", "args": args })).await?;
    let id = made.expect(201)?.json()["sessionID"].as_str().context("no ID")?.to_owned();
    websocket::attach(mesh, &sandbox.path(&format!("/exec/{id}"))).await
}

async fn next(socket: &mut Socket) -> anyhow::Result<Message> {
    Ok(timeout(Duration::from_secs(60), socket.next()).await?.context("it ended")??)
}

async fn throughput(mesh: &Mesh, sandbox: &Sandbox, table: &mut Table) -> anyhow::Result<()> {
    let mut rates = Vec::new();
    for _ in 0..ROUNDS {
        let script = format!("exec head -c {} /dev/zero", BULK_MIB << 20);
        let mut socket = attached(mesh, sandbox, &script).await?;
        socket.send(Message::binary(&b"\0\n"[..])).await?;
        let begun = Instant::now();
        let mut bytes = 0;
        loop {
            let message = next(&mut socket).await?.into_data();
            match message.first() {
                Some(1) => bytes += message.len() - 1,
                Some(3) => break,
                _ => {}
            }
        }
        ensure!(bytes == BULK_MIB << 20, "{bytes} bytes came");
        #[allow(clippy::cast_precision_loss, reason = "a small number")]
        rates.push(BULK_MIB as f64 / begun.elapsed().as_secs_f64());
    }
    let floor = table.floor.guest_to_host_mib_s;
    table.row("standard output to a WebSocket", median(&rates), "MiB/s", Target::LeastTimes(0.6, floor));
    Ok(())
}

/// Reads 1 MiB a second of what is written as fast as it can be.
async fn slow_reader(mesh: &Mesh, sandbox: &Sandbox, table: &mut Table) -> anyhow::Result<()> {
    let mut socket = attached(mesh, sandbox, "exec cat /dev/zero").await?;
    let memory = |service| -> anyhow::Result<f64> {
        let kib = processes::memory_kib(mesh.pid(service)?, "status", "VmRSS").context("no VmRSS")?;
        Ok(mib(kib))
    };
    let services = ["gateway", "vmm-agent"];
    let before = services.map(&memory);
    socket.send(Message::binary(&b"\0\n"[..])).await?;
    let begun = Instant::now();
    let (mut bytes, mut most) = (0, [0.0_f64; 2]);
    while begun.elapsed() < SLOW_FOR {
        bytes += next(&mut socket).await?.len();
        #[allow(clippy::cast_precision_loss, reason = "a small number")]
        let due = Duration::from_secs_f64(bytes as f64 / f64::from(1 << 20));
        sleep(due.saturating_sub(begun.elapsed())).await;
        for (most, service) in most.iter_mut().zip(services) {
            *most = most.max(memory(service)?);
        }
    }
    for ((service, before), most) in services.into_iter().zip(before).zip(most) {
        let row = format!("memory that the {service} takes on under a reader of 1 MiB/s");
        table.row(&row, most - before?, "MiB", Target::Most(16.0));
    }
    Ok(())
}

async fn echo(mesh: &Mesh, sandbox: &Sandbox, table: &mut Table) -> anyhow::Result<()> {
    let made = mesh.rest().post(&sandbox.path("/pty"), json!({ "shell": "/bin/cat" })).await?.expect(201)?;
    let id = made.json()["sessionID"].as_str().context("no ID")?.to_owned();
    let mut terminal = websocket::attach(mesh, &sandbox.path(&format!("/pty/{id}"))).await?;
    let quiet = keystrokes(&mut terminal).await?;
    let mut flood = attached(mesh, sandbox, "exec cat /dev/zero").await?;
    flood.send(Message::binary(&b"\0\n"[..])).await?;
    let flooding = tokio::spawn(async move {
        let mut bytes = 0;
        while let Some(Ok(message)) = flood.next().await {
            bytes += message.len();
        }
        bytes
    });
    let busy = keystrokes(&mut terminal).await?;
    flooding.abort();
    table.row("keystroke to echo through a WebSocket, p50", median(&quiet), "ms", Target::Most(5.0));
    table.row("keystroke to echo through a WebSocket, p99", quantile(&quiet, 0.99), "ms", Target::Most(25.0));
    let row = "the same while another session floods, p50";
    table.row(row, median(&busy), "ms", Target::MostTimesOf(3.0, median(&quiet), "without it"));
    let row = "the same while another session floods, p99";
    table.row(
        row,
        quantile(&busy, 0.99),
        "ms",
        Target::MostTimesOf(3.0, quantile(&quiet, 0.99), "without it"),
    );
    Ok(())
}

async fn keystrokes(terminal: &mut Socket) -> anyhow::Result<Vec<f64>> {
    let mut took = Vec::new();
    for number in 0..KEYS {
        // A line ends before the kernel's buffer for one is full.
        let key = if number % 64 == 63 { &b"\n"[..] } else { b"x" };
        let begun = Instant::now();
        terminal.send(Message::binary(key)).await?;
        while next(terminal).await?.is_empty() {}
        took.push(ms_since(begun));
        sleep(PAUSE).await;
        // What a line's end brings beside its echo.
        while let Ok(more) = timeout(Duration::from_millis(1), terminal.next()).await {
            more.context("it ended")??;
        }
    }
    Ok(took)
}

/// Attachments in which nothing happens.
pub async fn idle(mesh: &Mesh, table: &mut Table) -> anyhow::Result<()> {
    let rest = mesh.rest();
    let mut sandboxes = Vec::new();
    for _ in 0..SANDBOXES {
        sandboxes.push(rest.create(json!({ "timeout": 0, "memoryMB": 256 })).await?);
    }
    let gateway = mesh.pid("gateway")?;
    let memory =
        || processes::memory_kib(gateway, "status", "VmRSS").map(|kib| kib * 1024).context("no VmRSS");
    let before = memory()?;
    let each = IDLE / SANDBOXES;
    let sockets = try_join_all(sandboxes.iter().map(async |sandbox| {
        let made = rest.post(&sandbox.path("/exec"), json!({ "cmd": "cat" })).await?.expect(201)?;
        let id = made.json()["sessionID"].as_str().context("no ID")?.to_owned();
        let mut sockets = Vec::new();
        for _ in 0..each {
            sockets.push(websocket::attach(mesh, &sandbox.path(&format!("/exec/{id}"))).await?);
        }
        anyhow::Ok(sockets)
    }))
    .await?;
    let cpu = processes::cpu_time(gateway)?;
    let begun = Instant::now();
    sleep(IDLE_FOR).await;
    let busy = (processes::cpu_time(gateway)? - cpu).as_secs_f64() / begun.elapsed().as_secs_f64();
    #[allow(clippy::cast_precision_loss, reason = "a small number")]
    let kib = memory()?.saturating_sub(before) as f64 / 1024.0 / IDLE as f64;
    table.row("memory of the gateway for each of 10,000 idle WebSockets", kib, "KiB", Target::Most(30.0));
    table.row("what they take of a processor", 100.0 * busy, "%", Target::None);
    drop(sockets);
    for sandbox in sandboxes {
        sandbox.delete().await?;
    }
    Ok(())
}
