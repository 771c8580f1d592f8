//! What tests and benches that need several parts have in common: real meshes, and the ways into them.
//!
//! - [`prepared`]: what `make build` and `make setup-test` have put where.
//! - [`mesh`], [`etcd`]: a mesh of one's own, as `oc up` makes it; a record store for it.
//! - [`rest`]: the public API as a client without any of our code sees it.
//! - [`streams`]: a client of sessions that comes back after whatever dies. [`websocket`]: one that does not.
//! - [`messages_api`]: what an agent in a sandbox talks to instead of a model.
//! - [`memory`]: what a sandbox has in its memory alone.
//! - [`firecracker`]: VMs without a mesh.
//! - [`world`]: what a sandbox reaches, or does not.
//! - [`processes`], [`leftovers`]: what a mesh has on this machine, and what of it is left afterwards.
//! - [`suite`]: named tests that share one mesh, and end it whatever becomes of them.

pub mod etcd;
pub mod figures;
pub mod firecracker;
pub mod leftovers;
pub mod memory;
pub mod mesh;
pub mod messages_api;
pub mod prepared;
pub mod processes;
pub mod rest;
pub mod streams;
pub mod suite;
pub mod websocket;
pub mod world;
