//! The contract of the mesh: messages, service traits and clients, generated from the `.proto` files beside
//! this crate. It holds no logic.
//!
//! - [`v1`]: what the public may call (`oc.v1`).
//! - [`mesh`]: what passes between our own parts (`oc.mesh.v1`).
//! - [`DESCRIPTORS`]: the same, as a descriptor set: for reflection and for the REST projection.

/// Every `.proto` file of the contract with its imports, comments and options, as an encoded
/// `google.protobuf.FileDescriptorSet`.
pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptors.bin"));

pub use oc::{mesh::v1 as mesh, v1};

/// Our packages, nested as the generated code expects them.
mod oc {
    pub mod v1 {
        #![allow(missing_docs, missing_debug_implementations, unused_qualifications, clippy::all)]
        include!(concat!(env!("OUT_DIR"), "/oc.v1.rs"));
    }
    pub mod mesh {
        pub mod v1 {
            #![allow(missing_docs, missing_debug_implementations, unused_qualifications, clippy::all)]
            include!(concat!(env!("OUT_DIR"), "/oc.mesh.v1.rs"));
        }
    }
}

/// Google's messages that the contract uses.
pub mod google {
    /// `google.api`.
    pub mod api {
        #![allow(missing_docs, missing_debug_implementations, unused_qualifications, clippy::all)]
        #![allow(rustdoc::all)]
        include!(concat!(env!("OUT_DIR"), "/google.api.rs"));
    }
}
