//! The scheduler: what should exist. It decides, writes down what it has decided, and asks the hosts' agents to make it
//! so. It touches no microVM and carries no user's bytes.
//!
//! Where things stand:
//! - [`sandbox_id`], [`size`], [`validate`]: what a request may say.
//! - [`lifecycle`]: the life of a sandbox's record, with the diagram; [`quota`], [`placement`]: whether and where. Pure.
//! - [`ledger`]: the only way by which records change, counts of hosts and tenants along with them.
//! - [`agents`]: the hosts, as they are called.
//! - [`sandboxes`]: creating, looking, deleting; [`flows`]: work that outlives its caller; [`activity`]: who is idle.
//! - [`watch`]: what those who watch sandboxes are told.
//! - [`checkpoints`]: taking sandboxes' states down, going back to them, branching from them.
//! - [`previews`]: which ports others are meant to find, by which host names, and with which token.
//! - [`reconcile`]: makes what is agree with what should be, after any crash.
//! - [`rpc`]: the services; [`refusal`]: why a call is refused.
//! - [`fail`]: where a test has it die.
//! - [`config`], [`bootstrap`], [`app`]: coming up and going down; [`telemetry`]: what is counted; [`random`].

pub mod activity;
pub mod agents;
pub mod app;
pub mod bootstrap;
pub mod checkpoints;
pub mod config;
pub mod fail;
pub mod flows;
pub mod ledger;
pub mod lifecycle;
pub mod placement;
pub mod previews;
pub mod quota;
pub mod random;
pub mod reconcile;
pub mod refusal;
pub mod rpc;
pub mod sandbox_id;
pub mod sandboxes;
pub mod size;
pub mod telemetry;
pub mod validate;
pub mod watch;
