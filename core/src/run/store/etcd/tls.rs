//! Certificates from files. Files that are replaced are read again before the next call, without a restart and without a signal:
//! whoever rotates certificates (cert-manager, certbot, a cron job) only has to write them.
//!
//! Connections that are open keep what they were opened with. What cannot be used, because only one of two files has been
//! written yet for example, is said, and what was read before stays in force.

use std::fs::{self, Metadata};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use etcd_client::{Certificate, Client, ConnectOptions, Error, Identity, TlsOptions};
use tokio::sync::Mutex;

use super::EtcdSettings;
use super::cause::cause;
use crate::run::store::StoreError;

/// What is shown and what is believed on connections to etcd.
pub(super) struct Tls {
    authorities: PathBuf,
    /// How errors call them.
    authorities_name: &'static str,
    /// Certificate and key.
    pair: Option<(PathBuf, PathBuf)>,
    state: Mutex<State>,
}

/// What was read last.
struct State {
    stamps: Vec<Option<Stamp>>,
    /// How often usable files were read. None before it was tried whether they are usable.
    generation: Option<u64>,
    options: TlsOptions,
    /// What was said of files that cannot be used.
    said: Option<String>,
}

/// By which a file that was replaced, or written over, is known.
type Stamp = (u64, u64, i64, i64);

impl Tls {
    /// Reads the files that the settings name; none if no endpoint is TLS (`secure`) and nothing is named.
    pub(super) fn new(settings: &EtcdSettings, secure: bool) -> Result<Option<Self>, StoreError> {
        let EtcdSettings { cafile, certfile, keyfile, .. } = settings;
        let pair = match (certfile.clone(), keyfile.clone()) {
            (Some(cert), Some(key)) => Some((cert, key)),
            (None, None) => None,
            (Some(_), None) | (None, Some(_)) => {
                return Err(StoreError::Settings {
                    what: "etcd-certfile and etcd-keyfile".into(),
                    cause: "one is given without the other".into(),
                });
            }
        };
        let (authorities, authorities_name) = match cafile {
            Some(path) => (path.clone(), "etcd-cafile"),
            None if secure => {
                let named = std::env::var_os("SSL_CERT_FILE").map(PathBuf::from);
                (system_roots(named)?, "the system's authorities")
            }
            // As upstream: what is given for plain endpoints is not used.
            None => return Ok(None),
        };
        let state = State { stamps: Vec::new(), generation: None, options: TlsOptions::new(), said: None };
        let mut tls = Self { authorities, authorities_name, pair, state: Mutex::new(state) };
        let (stamps, options) = (tls.stamps(), tls.read()?);
        let state = tls.state.get_mut();
        (state.stamps, state.options) = (stamps, options);
        Ok(Some(tls))
    }

    /// What a new connection is opened with, and a number that is another when that has changed.
    pub(super) async fn current(&self) -> Result<(u64, TlsOptions), StoreError> {
        let mut state = self.state.lock().await;
        let stamps = self.stamps();
        if let Some(generation) = state.generation
            && stamps == state.stamps
        {
            return Ok((generation, state.options.clone()));
        }
        let read = match self.read() {
            Ok(options) => usable(&options).await.map(|()| options).map_err(|error| self.unusable(&error)),
            Err(error) => Err(error),
        };
        match (read, state.generation) {
            (Ok(options), before) => {
                if before.is_some() {
                    tracing::info!("the certificate files for etcd have changed, new connections use them");
                }
                state.generation = Some(before.map_or(0, |before| before + 1));
                (state.stamps, state.options, state.said) = (stamps, options, None);
            }
            // Read again at the next call: the other file may be on its way.
            (Err(error), Some(_)) => {
                let text = error.to_string();
                if state.said.as_ref() != Some(&text) {
                    tracing::warn!(
                        "the certificate files for etcd have changed and cannot be used, the earlier ones are: {text}"
                    );
                    state.said = Some(text);
                }
            }
            (Err(error), None) => return Err(error),
        }
        Ok((state.generation.unwrap_or_default(), state.options.clone()))
    }

    /// A word for who has to look into what the other side, or we, did not accept.
    pub(super) fn hint(&self, cause: &str) -> Option<String> {
        // The second: there is one of this name, with another key.
        if ["UnknownIssuer", "BadSignature"].iter().any(|said| cause.contains(said)) {
            let path = self.authorities.display();
            return Some(match self.authorities_name {
                "etcd-cafile" => {
                    format!("{path}, given as --etcd-cafile, does not hold the authority that signed it")
                }
                _ => format!("its authority is not among the system's in {path}; give it as --etcd-cafile"),
            });
        }
        // What certificates made by hand look like, in the order of how common they are.
        const MADE: [(&str, &str); 4] = [
            (
                "CaUsedAsEndEntity",
                "it shows the certificate of an authority: sign one for the server, or make this one anew with \
                 openssl req -x509 -addext basicConstraints=critical,CA:FALSE",
            ),
            (
                "UnsupportedCertVersion",
                "its certificate is of version 1: sign it with an -extfile that says subjectAltName",
            ),
            ("certificate expired", "renew etcd's certificate, if this host's clock is right"),
            ("not valid yet", "is this host's clock right?"),
        ];
        if let Some((_, advice)) = MADE.iter().find(|(said, _)| cause.contains(said)) {
            return Some((*advice).to_owned());
        }
        if cause.contains("handshake eof") || cause.contains("InvalidContentType") {
            return Some("if it speaks no TLS, its endpoint begins with http://".to_owned());
        }
        // How rustls says that the server refused us, and how hyper and the kernel say that it hung up: what comes first is chance.
        const REJECTED: [&str; 4] =
            ["received fatal alert", "connection closed", "broken pipe", "onnection reset"];
        let rejected = REJECTED.iter().any(|said| cause.contains(said));
        match &self.pair {
            None if rejected => {
                Some("if it asks for client certificates, give --etcd-certfile and --etcd-keyfile".to_owned())
            }
            Some((cert, _)) if rejected => {
                Some(format!("it may not accept our certificate {}; look into its log", cert.display()))
            }
            _ => None,
        }
    }

    fn stamps(&self) -> Vec<Option<Stamp>> {
        let pair = self.pair.iter().flat_map(|(cert, key)| [cert, key]);
        [&self.authorities]
            .into_iter()
            .chain(pair)
            .map(|path| fs::metadata(path).ok().as_ref().map(stamp))
            .collect()
    }

    fn read(&self) -> Result<TlsOptions, StoreError> {
        let authorities = Certificate::from_pem(read(self.authorities_name, &self.authorities)?);
        let tls = TlsOptions::new().ca_certificate(authorities);
        Ok(match &self.pair {
            Some((cert, key)) => {
                tls.identity(Identity::from_pem(read("etcd-certfile", cert)?, read("etcd-keyfile", key)?))
            }
            None => tls,
        })
    }

    fn unusable(&self, error: &Error) -> StoreError {
        let mut what = format!("{} {}", self.authorities_name, self.authorities.display());
        if let Some((cert, key)) = &self.pair {
            what += &format!(", etcd-certfile {}, etcd-keyfile {}", cert.display(), key.display());
        }
        StoreError::Settings { what, cause: cause(error) }
    }
}

/// Whether a connection can be opened with these: certificate and key belong together, all are what they should be. Nothing is
/// sent.
async fn usable(tls: &TlsOptions) -> Result<(), Error> {
    let options = ConnectOptions::new().with_tls(tls.clone());
    Client::connect(["https://nowhere.invalid"], Some(options)).await.map(drop)
}

fn stamp(file: &Metadata) -> Stamp {
    (file.ino(), file.len(), file.mtime(), file.mtime_nsec())
}

/// Where distributions keep the authorities that they trust, in one file; as Go looks for them.
const SYSTEM_ROOTS: [&str; 6] = [
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/ssl/ca-bundle.pem",
    "/etc/pki/tls/cacert.pem",
    "/etc/pki/ca-trust/extracted/pem/tls-ca-bundle.pem",
    "/etc/ssl/cert.pem",
];

/// The file with the system's authorities; `named` (SSL_CERT_FILE) outweighs the usual places.
fn system_roots(named: Option<PathBuf>) -> Result<PathBuf, StoreError> {
    let usual = || SYSTEM_ROOTS.iter().map(PathBuf::from).find(|path| path.exists());
    named.or_else(usual).ok_or_else(|| StoreError::Settings {
        what: "etcd endpoints".into(),
        cause: "https without --etcd-cafile needs the system's authorities, and there are none (on Debian: package \
                ca-certificates)"
            .into(),
    })
}

fn read(flag: &str, path: &Path) -> Result<Vec<u8>, StoreError> {
    fs::read(path).map_err(|source| StoreError::Settings {
        what: format!("{flag} {}", path.display()),
        cause: source.to_string(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_systems_authorities_are_where_the_variable_says() {
        assert_eq!(system_roots(Some("/x/ca.pem".into())).unwrap(), PathBuf::from("/x/ca.pem"));
    }
}
