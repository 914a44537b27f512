//! Endpoints as they were given, and as URLs.

use axum::http::Uri;

use super::EtcdSettings;
use crate::run::store::StoreError;

/// The endpoints' URLs. One without a scheme is TLS if there are certificate files, as upstream has it.
pub(super) fn urls(settings: &EtcdSettings) -> Result<Vec<String>, StoreError> {
    let files = [&settings.cafile, &settings.certfile, &settings.keyfile].iter().any(|file| file.is_some());
    let urls = settings.endpoints.iter().map(|text| url(text, files)).collect::<Result<Vec<_>, _>>()?;
    for plain in urls.iter().filter(|url| files && !is_secure(url)) {
        tracing::warn!(
            "etcd endpoint {plain} is not TLS: the certificate files are not used for it; with them say https://"
        );
    }
    Ok(urls)
}

fn url(text: &str, files: bool) -> Result<String, StoreError> {
    let url = match text.contains("://") {
        true => text.to_owned(),
        false if files => format!("https://{text}"),
        false => format!("http://{text}"),
    };
    // Before anything else: what is wrong with the others is shown.
    if url.contains('@') {
        return Err(StoreError::Settings {
            what: "etcd endpoints".into(),
            cause: "one holds a user name; give it as --etcd-username and FLANNELD_ETCD_PASSWORD".into(),
        });
    }
    let wrong = |cause: &str| StoreError::Settings {
        what: format!("etcd endpoint {text:?}"),
        cause: cause.to_owned(),
    };
    if !url.starts_with("https://") && !url.starts_with("http://") {
        return Err(wrong("it must begin with http:// or https://"));
    }
    let uri: Uri = url.parse().map_err(|_| {
        wrong("it is no URL like http://10.0.0.5:2379; an IPv6 address stands in brackets: http://[2001:db8::5]:2379")
    })?;
    let authority = uri.authority().map(|authority| authority.as_str()).unwrap_or_default();
    let port = authority.rsplit_once(':').map(|(_, port)| port).filter(|port| !port.ends_with(']'));
    match port {
        Some(port) if !port.parse::<u16>().is_ok_and(|port| port > 0) => {
            Err(wrong("its port is no number from 1 to 65535"))
        }
        _ => Ok(url),
    }
}

pub(super) fn is_secure(url: &str) -> bool {
    url.starts_with("https://")
}

/// A word about an endpoint without TLS that has never answered: how hyper and the kernel say that it hung up.
pub(super) fn hint(cause: &str) -> Option<String> {
    let hung_up =
        ["broken pipe", "connection closed", "onnection reset"].iter().any(|said| cause.contains(said));
    hung_up.then(|| "if it speaks TLS, its endpoint begins with https://".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_endpoint_is_a_url_or_an_error_that_says_what_it_should_be() {
        for (text, plain, with_files) in [
            ("http://10.0.0.5:2379", "http://10.0.0.5:2379", "http://10.0.0.5:2379"),
            ("https://etcd:2379/", "https://etcd:2379/", "https://etcd:2379/"),
            ("etcd-1:2379", "http://etcd-1:2379", "https://etcd-1:2379"),
            ("[2001:db8::5]:2379", "http://[2001:db8::5]:2379", "https://[2001:db8::5]:2379"),
            ("http://[::1]", "http://[::1]", "http://[::1]"),
        ] {
            assert_eq!(url(text, false).unwrap(), plain);
            assert_eq!(url(text, true).unwrap(), with_files);
        }
        for (text, part) in [
            ("http://::1:2379", "brackets"),
            ("http://[::1:2379", "no URL"),
            ("http://a b:2379", "no URL"),
            ("http://", "no URL"),
            ("http://10.0.0.5:99999", "port"),
            ("http://10.0.0.5:", "port"),
            ("http://10.0.0.5:0", "port"),
            ("unix:///run/etcd.sock", "http://"),
            ("ftp://a:1", "http://"),
        ] {
            let error = url(text, false).unwrap_err().to_string();
            assert!(error.contains(part) && error.contains(text), "{text}: {error}");
        }
        let error = url("https://root:hunter2@a b:1", false).unwrap_err().to_string();
        assert!(error.contains("--etcd-username") && !error.contains("hunter2"), "{error}");
    }
}
