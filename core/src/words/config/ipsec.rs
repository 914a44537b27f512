//! `Backend` of type ipsec.

use serde_json::json;

use super::document::{Document, Value};
use super::{ConfigError, Finding};
use crate::words::ipsec::IpsecConfig;
use crate::words::secret::Secret;

const KEYS: &[&str] = &["Type", "UDPEncap", "ESPProposal", "PSK"];

pub(super) fn read(options: &Document<'_>, findings: &mut Vec<Finding>) -> Result<IpsecConfig, ConfigError> {
    findings.extend(options.unknown_keys(KEYS));
    let given = |key: &str| options.get(key).filter(|value| !value.is_null());
    let psk = given("PSK").ok_or(ConfigError::Missing {
        key: "Backend.PSK",
        cause: "backend ipsec needs a key of at least 96 characters, the same on every host, for example from: openssl rand -hex 48",
    })?;
    Ok(IpsecConfig {
        udp_encap: given("UDPEncap").map(|value| value.bool()).transpose()?.unwrap_or(false),
        esp_proposal: given("ESPProposal")
            .map(|value| proposal(&value))
            .transpose()?
            .unwrap_or_else(|| IpsecConfig::ESP_PROPOSAL.into()),
        psk: key(&psk)?,
    })
}

fn key(value: &Value<'_>) -> Result<Secret<String>, ConfigError> {
    let key = value.string()?;
    match key.len() {
        short if short < IpsecConfig::PSK_MIN => Err(value.error(format!(
            "password is too short: it has {short} characters, and at least {} are wanted",
            IpsecConfig::PSK_MIN
        ))),
        // The length field of a value is 16 bits.
        long if long > usize::from(u16::MAX) => Err(value.error("password is too long")),
        _ => Ok(Secret::new(key)),
    }
}

/// One proposal: names of algorithms with dashes between them. What they are charon knows.
fn proposal(value: &Value<'_>) -> Result<String, ConfigError> {
    let text = value.string()?;
    let named = |part: &str| !part.is_empty() && part.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_');
    match text.len() < 256 && text.split('-').all(named) {
        true => Ok(text),
        false => Err(value.error(format!(
            "one proposal as strongSwan writes it was wanted, for example {}",
            IpsecConfig::ESP_PROPOSAL
        ))),
    }
}

pub(super) fn write(config: &IpsecConfig, backend: &mut serde_json::Map<String, serde_json::Value>) {
    if config.udp_encap {
        backend.insert("UDPEncap".into(), json!(true));
    }
    if config.esp_proposal != IpsecConfig::ESP_PROPOSAL {
        backend.insert("ESPProposal".into(), json!(config.esp_proposal));
    }
    backend.insert("PSK".into(), json!(config.psk.reveal()));
}
