//! What every service of the mesh shares. It knows records and members, not what a sandbox is beyond its record.
//!
//! Where things stand:
//! - [`store`], [`record`], [`keys`], [`view`]: the record store, embedded or etcd; typed access; live mirrors.
//! - [`membership`]: being a member under a lease, and seeing the others.
//! - [`endpoint`], [`channel`], [`serve`], [`layers`], [`relay`], [`endless`]: calls between our own parts; [`handoff`]: what goes
//!   past them.
//! - [`caller`], [`api_key`], [`token`], [`file_url`]: who calls.
//! - [`host_name`]: what stands before a port.
//! - [`error`]: stable reasons, one table to gRPC and HTTP.
//! - [`clock`], [`limits`], [`shutdown`], [`telemetry`]: time, what the system allows, stopping, seeing.
//! - [`fail`]: where a test has a service die.

pub mod api_key;
pub mod caller;
pub mod channel;
pub mod clock;
pub mod endless;
pub mod endpoint;
pub mod error;
pub mod fail;
pub mod file_url;
pub mod handoff;
pub mod host_name;
pub mod keys;
pub mod layers;
pub mod limits;
pub mod membership;
pub mod record;
pub mod relay;
pub mod serve;
pub mod shutdown;
pub mod store;
pub mod telemetry;
pub mod token;
pub mod view;

/// Version that members announce.
pub const VERSION: &str = env!("CARGO_PKG_VERSION");
