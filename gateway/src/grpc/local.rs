//! What the gateway answers itself: `grpc.health.v1` and server reflection, so that `grpcurl` needs no `.proto`
//! files. Reflection shows the public part of the contract alone.

use bytes::Bytes;
use http::{Request, Response};
use prost::Message;
use tonic::{body::Body, service::Routes};
use tonic_health::{ServingStatus, server::HealthReporter};
use tower::{Service as _, ServiceExt};

use crate::surface::Surface;

/// Paths begin with one of these.
const SERVICES: [&str; 3] = [
    "/grpc.health.v1.Health/",
    "/grpc.reflection.v1.ServerReflection/",
    "/grpc.reflection.v1alpha.ServerReflection/",
];

/// Package of what passes between our own parts.
const INTERNAL: &str = "oc.mesh";

/// The service that answers this path, if it is one of the gateway's own.
#[must_use]
pub fn service(path: &str) -> Option<&'static str> {
    SERVICES.into_iter().find(|service| path.starts_with(service))
}

/// Health and reflection.
#[derive(Debug)]
pub struct Local {
    routes: Routes,
    health: HealthReporter,
    services: Vec<String>,
}

impl Local {
    /// Reflects the public part of the contract, and reports its services as serving.
    ///
    /// # Errors
    /// The contract cannot be read.
    pub async fn new(surface: &Surface) -> Result<Self, tonic_reflection::server::Error> {
        let files = public_files(oc_proto::DESCRIPTORS)?;
        let reflected = || {
            tonic_reflection::server::Builder::configure()
                .register_encoded_file_descriptor_set(&files)
                .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
        };
        let (health, health_service) = tonic_health::server::health_reporter();
        let mut services: Vec<String> =
            surface.rpcs().map(|rpc| rpc.method.parent_service().full_name().to_owned()).collect();
        services.sort_unstable();
        services.dedup();
        let routes = Routes::new(health_service)
            .add_service(reflected().build_v1()?)
            .add_service(reflected().build_v1alpha()?);
        let local = Self { routes: routes.prepare(), health, services };
        local.report(ServingStatus::Serving).await;
        Ok(local)
    }

    /// Says to whoever watches that no new calls are to be sent.
    pub async fn drain(&self) {
        self.report(ServingStatus::NotServing).await;
    }

    async fn report(&self, serving: ServingStatus) {
        for service in self.services.iter().map(String::as_str).chain([""]) {
            self.health.set_service_status(service, serving).await;
        }
    }

    /// Answers a call to one of them.
    pub async fn answer(&self, request: Request<Body>) -> Response<Body> {
        let mut routes = self.routes.clone();
        let answered = match ServiceExt::<Request<Body>>::ready(&mut routes).await {
            Ok(ready) => ready.call(request).await,
            Err(never) => match never {},
        };
        answered.unwrap_or_else(|never| match never {})
    }
}

/// A descriptor set whose files are kept as they are encoded, options that prost does not know included.
#[derive(Message)]
struct Files {
    #[prost(bytes = "bytes", repeated, tag = "1")]
    file: Vec<Bytes>,
}

fn public_files(descriptors: &[u8]) -> Result<Vec<u8>, prost::DecodeError> {
    let mut files = Files::decode(descriptors)?;
    let mut public = Vec::new();
    for file in files.file {
        let package = prost_types::FileDescriptorProto::decode(file.clone())?;
        if !package.package().starts_with(INTERNAL) {
            public.push(file);
        }
    }
    files.file = public;
    Ok(files.encode_to_vec())
}
