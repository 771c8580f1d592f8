//! Agent sessions: until the SDK says its first word, beside the same SDK started by hand in the same microVM.

use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use futures_util::StreamExt as _;
use oc_integration::{mesh::Mesh, messages_api, rest::Sandbox, websocket};
use serde_json::{Value, json};
use tokio::time::timeout;

use crate::table::{Table, Target, median, ms_since};

const ROUNDS: usize = 3;
const PATIENCE: Duration = Duration::from_secs(60);
const PROMPT: &str = "step: say hello";
/// What somebody writes who has read the SDK's manual, with the options that our wrapper sets, too.
const BY_HAND: &str = "
    import { query } from '/usr/local/lib/opencomputer/agent/node_modules/@anthropic-ai/claude-agent-sdk/sdk.mjs';
    const options = { permissionMode: 'bypassPermissions', allowDangerouslySkipPermissions: true };
    for await (const message of query({ prompt: process.argv[2], options })) console.log(JSON.stringify(message));
";

pub async fn measure(mesh: &Mesh, table: &mut Table) -> anyhow::Result<()> {
    let rest = mesh.rest();
    let sandbox = rest.create(json!({ "timeout": 0 })).await?;
    let mut envs = messages_api::start(&sandbox).await?;
    envs.insert("CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC".into(), "1".into());
    sandbox.put("by-hand.mjs", BY_HAND).await?.expect(204)?;
    let by_hand = json!({ "cmd": "node", "args": ["by-hand.mjs", PROMPT], "envs": envs });
    let agent = json!({ "prompt": PROMPT, "envs": envs });
    let (mut hands, mut agents, mut ready) = (Vec::new(), Vec::new(), Vec::new());
    // In turn, and the first of each is not counted: it reads the programs from the disk.
    for round in 0..=ROUNDS {
        let hand = first_words(mesh, &sandbox, "exec", &by_hand).await?;
        let ours = first_words(mesh, &sandbox, "agent", &agent).await?;
        ensure!(ours.first < ours.init, "{hand:?}, {ours:?}");
        if round > 0 {
            hands.push(hand.init);
            agents.push(ours.init);
            ready.push(ours.first);
        }
    }
    table.row("start of an agent session to its first event", median(&ready), "ms", Target::None);
    table.row("start of the SDK by hand to its first message", median(&hands), "ms", Target::None);
    let row = "start of an agent session to the SDK's first message";
    table.row(row, median(&agents), "ms", Target::MostTimesOf(1.5, median(&hands), "by hand"));
    sandbox.delete().await
}

/// When something was said, milliseconds since it was asked for.
#[derive(Debug)]
struct Words {
    /// The first line.
    first: f64,
    /// The SDK's first message.
    init: f64,
}

/// Starts a session, and ends it once the SDK has said something.
async fn first_words(mesh: &Mesh, sandbox: &Sandbox, place: &str, order: &Value) -> anyhow::Result<Words> {
    let rest = mesh.rest();
    let begun = Instant::now();
    let made = rest.post(&sandbox.path(&format!("/{place}")), order.clone()).await?.expect(201)?.json();
    let id = made["sessionID"].as_str().context("no ID")?.to_owned();
    let mut socket = websocket::attach(mesh, &sandbox.path(&format!("/exec/{id}"))).await?;
    let (mut text, mut first) = (String::new(), None);
    let init = loop {
        let message = timeout(PATIENCE, socket.next()).await?.context("it ended")??.into_data();
        match message.split_first() {
            Some((1, output)) => text += &String::from_utf8_lossy(output),
            Some((3, _)) => anyhow::bail!("it ended: {text}"),
            _ => continue,
        }
        let since = ms_since(begun);
        first.get_or_insert(since);
        if text.contains("\"subtype\":\"init\"") {
            break since;
        }
    };
    // What follows would disturb the next one.
    rest.post(&sandbox.path(&format!("/exec/{id}/kill")), json!({ "signal": 9 })).await?.expect(204)?;
    while timeout(PATIENCE, socket.next()).await?.is_some_and(|message| message.is_ok()) {}
    Ok(Words { first: first.context("nothing was said")?, init })
}
