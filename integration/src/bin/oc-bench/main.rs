//! `make bench`: what the mesh takes, beside what the VMM alone takes, measured here and now. Prints Markdown.
//!
//! - [`floor`]: QEMU alone, with none of our code.
//! - [`create`], [`calls`], [`transfer`], [`memory`], [`streams`], [`agents`], [`previews`], [`crowd`]: one subject each.
//! - [`network`]: what it adds to a create, how many there can be, and what passes through one.
//! - [`firecracker`]: a restore under its jailer.
//! - [`captures`], [`curve`]: checkpoints, live forks and hibernation, done by [`timed`]; [`beside`] a peer's figures.
//! - [`table`]: rows, medians, and whether a target is met. A missed one is shown, and fails nothing.

mod agents;
mod beside;
mod calls;
mod captures;
mod create;
mod crowd;
mod curve;
mod firecracker;
mod floor;
mod memory;
mod network;
mod previews;
mod streams;
mod table;
mod timed;
mod transfer;

use std::fs;

use anyhow::Context as _;
use clap::Parser;
use oc_integration::mesh::Mesh;

use self::table::Table;

/// Measures this machine.
#[derive(Debug, Parser)]
struct Arguments {
    /// Subjects to measure, beside the floor; all where none is named
    #[arg(long, value_name = "SUBJECT", value_delimiter = ',')]
    #[arg(value_parser = ["create", "calls", "transfer", "memory", "streams", "idle", "agents", "previews", "network", "firecracker", "captures", "curve", "crowd"])]
    only: Vec<String>,
    /// Creates in a row of the subject `crowd`
    #[arg(long, default_value_t = 1000)]
    creates: usize,
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let arguments = Arguments::parse();
    let wanted = |subject: &str| arguments.only.is_empty() || arguments.only.iter().any(|s| s == subject);
    let floor = tokio::task::spawn_blocking(floor::measure).await?.context("the floor")?;
    let mut table = Table::new(&floor);

    if wanted("create") {
        create::measure(&mut table).await.context("create")?;
    }
    // One mesh for what needs no particular one; its pool stays small, so that it does not disturb.
    let mesh = Mesh::start(&["--pool-size", "4"])?;
    table.fact(
        "accelerator",
        mesh.rest().get("/api/nodes").await?.json()[0]["accelerator"].as_str().unwrap_or("?"),
    );
    if wanted("calls") {
        calls::measure(&mesh, &mut table).await.context("calls")?;
    }
    if wanted("transfer") {
        transfer::measure(&mesh, &mut table).await.context("transfer")?;
    }
    if wanted("memory") {
        memory::measure(&mesh, &mut table).await.context("memory")?;
    }
    if wanted("agents") {
        agents::measure(&mesh, &mut table).await.context("agents")?;
    }
    if wanted("streams") {
        streams::measure(&mesh, &mut table).await.context("streams")?;
    }
    if wanted("idle") {
        streams::idle(&mesh, &mut table).await.context("idle attachments")?;
    }
    if wanted("previews") {
        previews::measure(&mesh, &mut table).await.context("previews")?;
    }
    mesh.stop()?;
    let ours = match wanted("captures") {
        true => Some(captures::measure(&mut table).await.context("captures")?),
        false => None,
    };
    let curve = match wanted("curve") {
        true => Some(curve::measure().await.context("curve")?),
        false => None,
    };
    if wanted("crowd") {
        crowd::measure(&mut table, arguments.creates).await.context("crowd")?;
    }
    if wanted("network") {
        network::measure(&mut table).await.context("network")?;
    }
    if wanted("firecracker") {
        firecracker::measure(&mut table).await.context("firecracker")?;
    }
    for (name, value) in machine()? {
        table.fact(name, &value);
    }
    println!("{table}");
    if let Some(curve) = curve {
        println!("{curve}");
    }
    if let Some(ours) = ours {
        println!("{ours}");
    }
    Ok(())
}

/// Facts that a figure depends on.
fn machine() -> anyhow::Result<Vec<(&'static str, String)>> {
    let cpuinfo = fs::read_to_string("/proc/cpuinfo")?;
    let model = cpuinfo.lines().find_map(|line| line.strip_prefix("model name\t: ")).unwrap_or("unknown");
    let cores = std::thread::available_parallelism()?;
    let memory = fs::read_to_string("/proc/meminfo")?;
    let total: u64 = memory
        .lines()
        .find_map(|line| line.strip_prefix("MemTotal:")?.split_whitespace().next()?.parse().ok())
        .unwrap_or_default();
    let kernel = fs::read_to_string("/proc/sys/kernel/osrelease")?;
    Ok(vec![
        ("processor", format!("{model}, {cores} cores")),
        ("memory", format!("{} GiB", total.div_ceil(1 << 20))),
        ("host kernel", kernel.trim().to_owned()),
    ])
}
