//! The suite, and what it stands on.

pub mod child;
mod embedded_only;
mod etcd_only;
pub mod fixture;
pub mod keys;
pub mod leases;
pub mod model;
pub mod transactions;
pub mod watches;
