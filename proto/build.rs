//! Compiles the .proto files in pure Rust: no `protoc` is needed.

use std::{env, error::Error, fs, path::PathBuf};

use prost::Message as _;

const FILES: &[&str] = &[
    "oc/v1/agent_session.proto",
    "oc/v1/checkpoint.proto",
    "oc/v1/doctor.proto",
    "oc/v1/exec.proto",
    "oc/v1/files.proto",
    "oc/v1/key.proto",
    "oc/v1/node.proto",
    "oc/v1/network.proto",
    "oc/v1/port.proto",
    "oc/v1/preview.proto",
    "oc/v1/sandbox.proto",
    "oc/mesh/v1/agent.proto",
    "oc/mesh/v1/guest.proto",
    "oc/mesh/v1/records.proto",
];

fn main() -> Result<(), Box<dyn Error>> {
    for directory in ["oc", "google"] {
        println!("cargo:rerun-if-changed={directory}");
    }
    let mut compiler = protox::Compiler::new(["."])?;
    compiler.include_imports(true).include_source_info(true).open_files(FILES)?;

    // Encoded by protox rather than by prost, which would drop the options that we extend.
    let encoded = compiler.encode_file_descriptor_set();
    fs::write(PathBuf::from(env::var("OUT_DIR")?).join("descriptors.bin"), &encoded)?;

    let descriptors = prost_types::FileDescriptorSet::decode(encoded.as_slice())?;
    tonic_prost_build::configure()
        .build_transport(cfg!(feature = "transport"))
        .bytes(".google.api.HttpBody.data")
        .bytes(".oc.v1.RunRequest.stdin")
        .bytes(".oc.v1.RunResponse")
        .bytes(".oc.v1.RunAsyncRequest.stdin")
        .bytes(".oc.v1.RunAsyncResponse")
        .bytes(".oc.v1.GetExecResultResponse")
        .bytes(".oc.v1.ExecStdin")
        .bytes(".oc.v1.ExecOutput")
        .bytes(".oc.v1.ForwardPortRequest")
        .bytes(".oc.v1.ForwardPortResponse")
        .compile_fds(descriptors)?;
    Ok(())
}
