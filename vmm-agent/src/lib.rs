//! What does exist on one host: microVMs, their disks and memory, and the link to each guest.
//!
//! From the outside in:
//! - [`config`], [`app`]: what it is told, and what it is made of.
//! - [`rpc`], [`data_plane`], [`membership`]: what the mesh sees of it.
//! - [`host`], [`vm`], [`pool`]: the sandboxes' VMs and those that wait to become one.
//! - [`workshop`], [`microvm`], [`journal`], [`tombstones`]: making one, step by step, so that a crash of the
//!   agent at any step leaves what its next start finishes or undoes.
//! - [`backend`]: the seam to what drives VMMs; [`driver`]: what does.
//! - [`network`]: a namespace for each VM, and what it may reach from there; [`seclusion`]: no part of the mesh.
//! - [`cleanup`], [`lock`], [`data_image`]: leaving nothing behind; one agent per data directory, which may be on a filesystem
//!   of its own.
//! - [`doctor`]: what this machine lacks, before an agent is started on it.
//! - [`capacity`], [`telemetry`], [`identity`]: what the host has, what is counted, what things are called.
//! - [`fail`]: where a test has it die.

pub mod app;
pub mod backend;
pub mod capacity;
pub mod cleanup;
pub mod config;
pub mod data_image;
pub mod data_plane;
pub mod doctor;
pub mod driver;
pub mod fail;
pub mod host;
pub mod identity;
pub mod journal;
pub mod lock;
pub mod membership;
pub mod microvm;
pub mod network;
pub mod pool;
pub mod rpc;
pub mod seclusion;
pub mod telemetry;
pub mod tombstones;
pub mod vm;
pub mod workshop;
