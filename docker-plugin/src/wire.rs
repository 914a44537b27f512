//! The engine's requests and our answers, as JSON on the wire.
//!
//! **Source** — libnetwork `drivers/remote/api`, `ipams/remote/api` (moby/moby), and what engines were seen to send.
//! An absent map arrives as `null`, an absent list as `[]` or `null`; unknown keys are left alone, because later
//! engines add some.

use std::collections::BTreeMap;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::{Map, Value};

use flannel_core::words::addr::{InterfaceAddress, Mac, Prefix};

/// `Options`: a map of anything, or `null`.
pub(crate) type Options = BTreeMap<String, Value>;

/// `null` where a map, a list or a text was meant.
fn null_is_empty<'de, D: Deserializer<'de>, T: Default + Deserialize<'de>>(from: D) -> Result<T, D::Error> {
    Ok(Option::deserialize(from)?.unwrap_or_default())
}

/// The same for a structure, which serde would also take from a list of its values.
fn null_is_empty_object<'de, D, T>(from: D) -> Result<T, D::Error>
where
    D: Deserializer<'de>,
    T: Default + DeserializeOwned,
{
    let object: Option<Map<String, Value>> = Option::deserialize(from)?;
    object.map_or_else(|| Ok(T::default()), of_object)
}

/// The same for a list of structures.
fn null_is_no_object<'de, D: Deserializer<'de>, T: DeserializeOwned>(from: D) -> Result<Vec<T>, D::Error> {
    let objects: Option<Vec<Map<String, Value>>> = Option::deserialize(from)?;
    objects.unwrap_or_default().into_iter().map(of_object).collect()
}

fn of_object<T: DeserializeOwned, E: serde::de::Error>(object: Map<String, Value>) -> Result<T, E> {
    serde_json::from_value(Value::Object(object)).map_err(E::custom)
}

/// `IpamDriver.RequestPool`
#[derive(Deserialize, Debug)]
#[serde(rename_all = "PascalCase")]
pub(crate) struct RequestPool {
    /// What follows `--subnet`, with host bits as typed (engines before 25 let them pass); empty if nothing did.
    pub(crate) pool: String,
    /// What follows `--ip-range`.
    #[serde(default)]
    pub(crate) sub_pool: String,
    /// Every `--ipam-opt`.
    #[serde(default, deserialize_with = "null_is_empty")]
    pub(crate) options: BTreeMap<String, String>,
    /// Whether the pool is for IPv6.
    #[serde(default)]
    pub(crate) v6: bool,
}

/// Answer to [`RequestPool`].
#[derive(Serialize, Debug)]
pub(crate) struct Pool {
    #[serde(rename = "PoolID")]
    pub(crate) pool_id: String,
    #[serde(rename = "Pool")]
    pub(crate) pool: Prefix,
    #[serde(rename = "Data")]
    pub(crate) data: BTreeMap<String, String>,
}

/// `IpamDriver.ReleasePool`
#[derive(Deserialize, Debug)]
pub(crate) struct ReleasePool {
    #[serde(rename = "PoolID")]
    pub(crate) pool_id: String,
}

/// `IpamDriver.RequestAddress`
#[derive(Deserialize, Debug)]
pub(crate) struct RequestAddress {
    #[serde(rename = "PoolID")]
    pub(crate) pool_id: String,
    /// Without a mask; empty means any.
    #[serde(rename = "Address", default)]
    pub(crate) address: String,
    #[serde(rename = "Options", default, deserialize_with = "null_is_empty")]
    pub(crate) options: BTreeMap<String, String>,
}

impl RequestAddress {
    /// Whether the engine wants the network's gateway, not an endpoint's address.
    pub(crate) fn is_gateway(&self) -> bool {
        self.options.get("RequestAddressType").is_some_and(|kind| kind == "com.docker.network.gateway")
    }
}

/// Answer to [`RequestAddress`].
#[derive(Serialize, Debug)]
#[serde(rename_all = "PascalCase")]
pub(crate) struct Address {
    pub(crate) address: InterfaceAddress,
    pub(crate) data: BTreeMap<String, String>,
}

/// `IpamDriver.ReleaseAddress`
#[derive(Deserialize, Debug)]
pub(crate) struct ReleaseAddress {
    #[serde(rename = "PoolID")]
    pub(crate) pool_id: String,
    #[serde(rename = "Address")]
    pub(crate) address: String,
}

/// One pool of a network.
#[derive(Serialize, Deserialize, Clone, PartialEq, Eq, Debug)]
#[serde(rename_all = "PascalCase")]
pub(crate) struct PoolData {
    /// `flannel-local` when the pool came from us, `LocalDefault` from the engine's own IPAM, `null` from none.
    #[serde(default)]
    pub(crate) address_space: String,
    /// CIDR.
    #[serde(default)]
    pub(crate) pool: String,
    /// CIDR; absent if there is none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) gateway: Option<String>,
    /// Name to CIDR.
    #[serde(default, deserialize_with = "null_is_empty")]
    pub(crate) aux_addresses: BTreeMap<String, String>,
}

/// `NetworkDriver.CreateNetwork`; kept whole in the journal, because no engine sends it again.
#[derive(Serialize, Deserialize, Clone, PartialEq, Debug)]
pub(crate) struct CreateNetwork {
    /// 64 hex digits, or 25 characters for a network of a swarm.
    #[serde(rename = "NetworkID")]
    pub(crate) network_id: String,
    #[serde(rename = "Options", default, deserialize_with = "null_is_empty")]
    pub(crate) options: Options,
    #[serde(rename = "IPv4Data", default, deserialize_with = "null_is_no_object")]
    pub(crate) ipv4_data: Vec<PoolData>,
    #[serde(rename = "IPv6Data", default, deserialize_with = "null_is_no_object")]
    pub(crate) ipv6_data: Vec<PoolData>,
}

/// `NetworkDriver.DeleteNetwork`
#[derive(Deserialize, Debug)]
pub(crate) struct DeleteNetwork {
    #[serde(rename = "NetworkID")]
    pub(crate) network_id: String,
}

/// `Interface` of [`CreateEndpoint`]; what is not set is `""`.
#[derive(Serialize, Deserialize, Clone, PartialEq, Eq, Default, Debug)]
pub(crate) struct Interface {
    #[serde(rename = "Address", default)]
    pub(crate) address: String,
    #[serde(rename = "AddressIPv6", default)]
    pub(crate) address_ipv6: String,
    #[serde(rename = "MacAddress", default)]
    pub(crate) mac_address: String,
}

/// `NetworkDriver.CreateEndpoint`
#[derive(Deserialize, Debug)]
pub(crate) struct CreateEndpoint {
    #[serde(rename = "NetworkID")]
    pub(crate) network_id: String,
    #[serde(rename = "EndpointID")]
    pub(crate) endpoint_id: String,
    #[serde(rename = "Interface", default, deserialize_with = "null_is_empty_object")]
    pub(crate) interface: Interface,
    #[serde(rename = "Options", default, deserialize_with = "null_is_empty")]
    pub(crate) options: Options,
}

/// Answer to [`CreateEndpoint`]: only what the engine did not choose itself, or it takes the answer for a change.
#[derive(Serialize, Debug)]
pub(crate) struct CreatedEndpoint {
    #[serde(rename = "Interface", skip_serializing_if = "Option::is_none")]
    pub(crate) interface: Option<ChosenInterface>,
}

/// The part of an interface that we chose.
#[derive(Serialize, Debug)]
pub(crate) struct ChosenInterface {
    #[serde(rename = "Address", skip_serializing_if = "Option::is_none")]
    pub(crate) address: Option<InterfaceAddress>,
    #[serde(rename = "AddressIPv6", skip_serializing_if = "Option::is_none")]
    pub(crate) address_ipv6: Option<InterfaceAddress>,
    #[serde(rename = "MacAddress", skip_serializing_if = "Option::is_none")]
    pub(crate) mac_address: Option<Mac>,
}

/// Every request that names an endpoint and needs no more: DeleteEndpoint, Leave, EndpointOperInfo, Revoke….
#[derive(Deserialize, Debug)]
pub(crate) struct Endpoint {
    #[serde(rename = "NetworkID")]
    pub(crate) network_id: String,
    #[serde(rename = "EndpointID")]
    pub(crate) endpoint_id: String,
}

/// `NetworkDriver.Join`. The sandbox is not entered: up to engine 27 it does not exist yet.
#[derive(Deserialize, Debug)]
pub(crate) struct Join {
    #[serde(rename = "NetworkID")]
    pub(crate) network_id: String,
    #[serde(rename = "EndpointID")]
    pub(crate) endpoint_id: String,
    /// A path; the same for all endpoints of a container.
    #[serde(rename = "SandboxKey", default)]
    pub(crate) sandbox_key: String,
}

/// Answer to [`Join`].
#[derive(Serialize, Debug)]
#[serde(rename_all = "PascalCase")]
pub(crate) struct Joined {
    pub(crate) interface_name: InterfaceName,
    /// Without a mask.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) gateway: Option<String>,
    #[serde(rename = "GatewayIPv6", skip_serializing_if = "Option::is_none")]
    pub(crate) gateway_ipv6: Option<String>,
    pub(crate) static_routes: Vec<StaticRoute>,
}

/// Which interface the engine moves into the sandbox, and what it is called there: the prefix and a number.
#[derive(Serialize, Debug)]
#[serde(rename_all = "PascalCase")]
pub(crate) struct InterfaceName {
    pub(crate) src_name: String,
    pub(crate) dst_prefix: String,
}

/// A route the engine adds inside the sandbox.
#[derive(Serialize, Debug)]
#[serde(rename_all = "PascalCase")]
pub(crate) struct StaticRoute {
    pub(crate) destination: Prefix,
    /// 0: by a next hop; 1: connected.
    pub(crate) route_type: u8,
    pub(crate) next_hop: String,
}

/// `NetworkDriver.ProgramExternalConnectivity`
#[derive(Deserialize, Debug)]
pub(crate) struct ProgramExternalConnectivity {
    #[serde(rename = "NetworkID")]
    pub(crate) network_id: String,
    #[serde(rename = "EndpointID")]
    pub(crate) endpoint_id: String,
    #[serde(rename = "Options", default, deserialize_with = "null_is_empty")]
    pub(crate) options: Options,
}

/// One `-p`, as `com.docker.network.portmap` holds it. A range on both sides comes split, one entry per port.
#[derive(Deserialize, Clone, PartialEq, Eq, Debug)]
pub(crate) struct PortBinding {
    /// IP protocol number: 6 TCP, 17 UDP, 132 SCTP.
    #[serde(rename = "Proto")]
    pub(crate) proto: u8,
    /// In the container.
    #[serde(rename = "Port")]
    pub(crate) port: u16,
    /// On which address of the host; empty means all, or the network's default.
    #[serde(rename = "HostIP", default)]
    pub(crate) host_ip: String,
    /// On the host; 0 means any.
    #[serde(rename = "HostPort", default)]
    pub(crate) host_port: u16,
    /// The last of those that will do, if there are several.
    #[serde(rename = "HostPortEnd", default)]
    pub(crate) host_port_end: u16,
}

/// The ports that `-p` and `-P` ask for.
pub(crate) fn port_bindings(options: &Options) -> Result<Vec<PortBinding>, serde_json::Error> {
    let entry = options.get("com.docker.network.portmap").cloned().unwrap_or(Value::Null);
    Ok(serde_json::from_value::<Option<Vec<PortBinding>>>(entry)?.unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn null_stands_for_empty_wherever_engines_send_it() {
        let request: RequestPool =
            serde_json::from_str(r#"{"AddressSpace":"x","Pool":"","SubPool":"","Options":null,"V6":false}"#)
                .unwrap();
        assert!(request.options.is_empty());
        let request: CreateNetwork =
            serde_json::from_str(r#"{"NetworkID":"n","Options":null,"IPv4Data":null,"IPv6Data":null}"#)
                .unwrap();
        assert!(request.ipv4_data.is_empty());
        let request: CreateEndpoint =
            serde_json::from_str(r#"{"NetworkID":"n","EndpointID":"e","Interface":null,"Options":{}}"#)
                .unwrap();
        assert_eq!(request.interface, Interface::default());
    }

    #[test]
    fn a_request_without_its_keys_is_no_request() {
        assert!(serde_json::from_str::<RequestPool>("{}").is_err());
        assert!(serde_json::from_str::<RequestAddress>(r#"{"Address":""}"#).is_err());
        assert!(serde_json::from_str::<CreateNetwork>(r#"{"Options":{}}"#).is_err());
        assert!(serde_json::from_str::<Join>(r#"{"NetworkID":"n"}"#).is_err());
    }

    #[test]
    fn ports_are_found_where_the_engine_puts_them() {
        let options: Options = serde_json::from_str(
            r#"{"com.docker.network.portmap":[{"Proto":6,"IP":"","Port":80,"HostIP":"","HostPort":8080,"HostPortEnd":8080}]}"#,
        )
        .unwrap();
        let wanted =
            PortBinding { proto: 6, port: 80, host_ip: "".into(), host_port: 8080, host_port_end: 8080 };
        assert_eq!(port_bindings(&options).unwrap(), [wanted]);
        assert_eq!(port_bindings(&Options::new()).unwrap(), []);
        let odd = Options::from([("com.docker.network.portmap".into(), Value::from("80"))]);
        assert!(port_bindings(&odd).is_err());
    }
}
