//! Certificates for development: `oc up --tls` signs one for this machine's names.
//!
//! | path in `tls/` | what |
//! | --- | --- |
//! | `ca.crt` | the authority, for whoever is to trust the gateway |
//! | `server.crt`, `server.key` | what the gateway shows, and its key, for its owner only |
//!
//! The authority signs once. Its own key is never written down, so nothing else can be signed with it by whoever reads this
//! directory, and trusting it is trusting this gateway alone. Where the names change or the certificate is about to expire,
//! there are a new authority and a new certificate.

use std::{
    fs, io,
    net::SocketAddr,
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DistinguishedName, DnType, ExtendedKeyUsagePurpose,
    IsCa, KeyPair, KeyUsagePurpose,
};

use crate::{config::write_secret, failure::Failure};

/// For how long a certificate is good. Browsers refuse more than 825 days, even from authorities of one's own.
const GOOD_FOR: Duration = Duration::from_secs(397 * 24 * 3600);
/// How long before its end there is a new one.
const RENEWED: Duration = Duration::from_secs(30 * 24 * 3600);
/// Clocks may differ by this much.
const LEEWAY: Duration = Duration::from_secs(24 * 3600);

/// The files.
#[derive(Debug, Clone)]
pub struct Certificates {
    /// The authority.
    pub ca: PathBuf,
    /// What is shown.
    pub certificate: PathBuf,
    /// Its key.
    pub key: PathBuf,
    names: PathBuf,
}

impl Certificates {
    /// In this directory.
    pub fn at(directory: &Path) -> Self {
        let file = |name| directory.join(name);
        Self {
            ca: file("ca.crt"),
            certificate: file("server.crt"),
            key: file("server.key"),
            names: file("names"),
        }
    }

    /// Makes sure that there are some for a gateway that listens there and shows ports under `preview_domain`.
    pub fn ensure(&self, listen: SocketAddr, preview_domain: &str) -> Result<(), Failure> {
        let names = names(listen, preview_domain);
        if self.is_good_for(&names) {
            return Ok(());
        }
        self.make(&names).map_err(|error| Failure::local("cannot make certificates", error))
    }

    fn is_good_for(&self, names: &[String]) -> bool {
        let is_fresh = |path: &Path| {
            let made = fs::metadata(path).and_then(|metadata| metadata.modified()).ok();
            made.and_then(|made| SystemTime::now().duration_since(made).ok())
                .is_some_and(|age| age < GOOD_FOR - RENEWED)
        };
        // The names are written last: without them the others are half made.
        let written = fs::read_to_string(&self.names).unwrap_or_default();
        written == names.join("\n")
            && [&self.ca, &self.certificate, &self.key].into_iter().all(|path| is_fresh(path))
    }

    fn make(&self, names: &[String]) -> io::Result<()> {
        let now = SystemTime::now();
        let (from, until) = (now - LEEWAY, now + GOOD_FOR);
        let mut ca = CertificateParams::new(Vec::<String>::new()).map_err(io::Error::other)?;
        ca.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        ca.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        ca.distinguished_name = named("opencomputer development");
        (ca.not_before, ca.not_after) = (from.into(), until.into());
        let issuer = CertifiedIssuer::self_signed(ca, KeyPair::generate().map_err(io::Error::other)?)
            .map_err(io::Error::other)?;
        let key = KeyPair::generate().map_err(io::Error::other)?;
        let mut server = CertificateParams::new(names).map_err(io::Error::other)?;
        server.distinguished_name = named("opencomputer gateway");
        server.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        server.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        server.use_authority_key_identifier_extension = true;
        (server.not_before, server.not_after) = (from.into(), until.into());
        let signed = server.signed_by(&key, &issuer).map_err(io::Error::other)?;
        match fs::remove_file(&self.names) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        write_secret(&self.key, key.serialize_pem().as_bytes())?;
        write_secret(&self.certificate, signed.pem().as_bytes())?;
        write_secret(&self.ca, issuer.pem().as_bytes())?;
        write_secret(&self.names, names.join("\n").as_bytes())
    }
}

fn named(name: &str) -> DistinguishedName {
    let mut distinguished = DistinguishedName::new();
    distinguished.push(DnType::CommonName, name);
    distinguished
}

/// The names by which a gateway is reached that listens there.
fn names(listen: SocketAddr, preview_domain: &str) -> Vec<String> {
    let mut names = vec!["localhost".to_owned(), preview_domain.to_owned(), format!("*.{preview_domain}")];
    names.extend(["127.0.0.1".to_owned(), "::1".to_owned()]);
    let ip = listen.ip();
    if !ip.is_unspecified() && !ip.is_loopback() {
        names.push(ip.to_string());
    }
    let host = nix::unistd::gethostname().ok().and_then(|name| name.into_string().ok());
    names.extend(host.filter(|name| !name.is_empty()));
    names
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[test]
    fn certificates_are_made_once_for_the_same_names() {
        let directory = tempfile::tempdir().unwrap();
        let certificates = Certificates::at(&directory.path().join("tls"));
        let listen = "127.0.0.1:8080".parse().unwrap();
        certificates.ensure(listen, "preview.localhost").unwrap();
        let first = fs::read(&certificates.certificate).unwrap();
        certificates.ensure(listen, "preview.localhost").unwrap();
        assert_eq!(fs::read(&certificates.certificate).unwrap(), first);
        certificates.ensure(listen, "other.example").unwrap();
        assert_ne!(fs::read(&certificates.certificate).unwrap(), first);
        assert_eq!(fs::metadata(&certificates.key).unwrap().permissions().mode() & 0o777, 0o600);
        // What is trusted by the authority alone is what it has signed.
        crate::tls::Connector::new("h2", Some(&certificates.ca)).unwrap();
    }
}
