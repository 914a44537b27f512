//! The little of the container runtime interface (CRI, `runtime.v1`) that a kubelet says to make and remove pods.

use std::collections::HashMap;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};
use prost::Message;
use tokio::runtime::Runtime;
use tonic::Request;
use tonic::client::Grpc;
use tonic::codegen::http::uri::PathAndQuery;
use tonic::transport::{Channel, Endpoint};
use tonic_prost::ProstCodec;

/// How long a call may take: a sandbox is a container of its own.
const CALL_DEADLINE: Duration = Duration::from_secs(60);

/// A kubelet's end of a runtime's socket.
pub(crate) struct Cri {
    runtime: Runtime,
    channel: Channel,
}

impl Cri {
    /// Connects to a runtime's socket.
    pub(crate) fn connect(socket: &Path) -> Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let endpoint =
            Endpoint::try_from(format!("unix://{}", socket.display()))?.connect_timeout(CALL_DEADLINE);
        let channel = runtime
            .block_on(endpoint.connect())
            .with_context(|| format!("could not connect to {}", socket.display()))?;
        Ok(Self { runtime, channel })
    }

    /// Makes a pod, returns its id.
    pub(crate) fn run_pod(&self, config: PodSandboxConfig) -> Result<String> {
        let request = RunPodSandboxRequest { config: Some(config), runtime_handler: String::new() };
        Ok(self.call::<_, PodSandboxId>("RunPodSandbox", request)?.pod_sandbox_id)
    }

    /// Takes a pod's network and processes away; its record stays.
    pub(crate) fn stop_pod(&self, id: &str) -> Result<()> {
        self.call("StopPodSandbox", PodSandboxId { pod_sandbox_id: id.to_owned() }).map(|Nothing {}| ())
    }

    /// Takes the record away too.
    pub(crate) fn remove_pod(&self, id: &str) -> Result<()> {
        self.call("RemovePodSandbox", PodSandboxId { pod_sandbox_id: id.to_owned() }).map(|Nothing {}| ())
    }

    /// The pod's addresses as the runtime has them, and what else it tells (JSON).
    pub(crate) fn pod(&self, id: &str) -> Result<(Vec<String>, serde_json::Value)> {
        let request = PodSandboxStatusRequest { pod_sandbox_id: id.to_owned(), verbose: true };
        let answer: PodSandboxStatusResponse = self.call("PodSandboxStatus", request)?;
        let network = answer.status.and_then(|status| status.network).context("no network status")?;
        let addresses = [network.ip].into_iter().chain(network.additional_ips.into_iter().map(|ip| ip.ip));
        let verbose = answer.info.get("info").context("no verbose answer")?;
        Ok((addresses.collect(), serde_json::from_str(verbose)?))
    }

    /// The ids of all pods that have a record.
    pub(crate) fn pods(&self) -> Result<Vec<String>> {
        let answer: ListPodSandboxResponse = self.call("ListPodSandbox", Nothing {})?;
        Ok(answer.items.into_iter().map(|pod| pod.id).collect())
    }

    /// Whether the runtime says that its network is ready, and why not.
    pub(crate) fn network_ready(&self) -> Result<(bool, String)> {
        let answer: StatusResponse = self.call("Status", StatusRequest { verbose: false })?;
        let conditions = answer.status.context("no status")?.conditions;
        let network = conditions.into_iter().find(|condition| condition.kind == "NetworkReady");
        network.map(|condition| (condition.status, condition.message)).context("nothing about the network")
    }

    fn call<Q, A>(&self, method: &str, request: Q) -> Result<A>
    where
        Q: Message + 'static,
        A: Message + Default + 'static,
    {
        let path = PathAndQuery::try_from(format!("/runtime.v1.RuntimeService/{method}"))?;
        let mut client = Grpc::new(self.channel.clone());
        let mut request = Request::new(request);
        request.set_timeout(CALL_DEADLINE);
        let answer = self.runtime.block_on(async {
            client.ready().await?;
            let answer = client.unary(request, path, ProstCodec::<Q, A>::default()).await?;
            anyhow::Ok(answer.into_inner())
        });
        answer.context(method.to_owned())
    }
}

#[derive(Clone, PartialEq, Message)]
struct Nothing {}

/// A pod as the kubelet asks for it.
#[derive(Clone, PartialEq, Message)]
pub(crate) struct PodSandboxConfig {
    #[prost(message, optional, tag = "1")]
    pub(crate) metadata: Option<PodSandboxMetadata>,
    #[prost(string, tag = "2")]
    pub(crate) hostname: String,
    #[prost(string, tag = "3")]
    pub(crate) log_directory: String,
    #[prost(message, repeated, tag = "5")]
    pub(crate) port_mappings: Vec<PortMapping>,
    #[prost(map = "string, string", tag = "7")]
    pub(crate) annotations: HashMap<String, String>,
    #[prost(message, optional, tag = "8")]
    pub(crate) linux: Option<LinuxPodSandboxConfig>,
}

#[derive(Clone, PartialEq, Message)]
pub(crate) struct PodSandboxMetadata {
    #[prost(string, tag = "1")]
    pub(crate) name: String,
    #[prost(string, tag = "2")]
    pub(crate) uid: String,
    #[prost(string, tag = "3")]
    pub(crate) namespace: String,
    #[prost(uint32, tag = "4")]
    pub(crate) attempt: u32,
}

#[derive(Clone, PartialEq, Message)]
pub(crate) struct PortMapping {
    #[prost(enumeration = "Protocol", tag = "1")]
    pub(crate) protocol: i32,
    #[prost(int32, tag = "2")]
    pub(crate) container_port: i32,
    #[prost(int32, tag = "3")]
    pub(crate) host_port: i32,
    #[prost(string, tag = "4")]
    pub(crate) host_ip: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, prost::Enumeration)]
#[repr(i32)]
pub(crate) enum Protocol {
    Tcp = 0,
    Udp = 1,
    Sctp = 2,
}

#[derive(Clone, PartialEq, Message)]
pub(crate) struct LinuxPodSandboxConfig {
    #[prost(string, tag = "1")]
    pub(crate) cgroup_parent: String,
}

#[derive(Clone, PartialEq, Message)]
struct RunPodSandboxRequest {
    #[prost(message, optional, tag = "1")]
    config: Option<PodSandboxConfig>,
    #[prost(string, tag = "2")]
    runtime_handler: String,
}

/// The one field of three requests and of one answer.
#[derive(Clone, PartialEq, Message)]
struct PodSandboxId {
    #[prost(string, tag = "1")]
    pod_sandbox_id: String,
}

#[derive(Clone, PartialEq, Message)]
struct PodSandboxStatusRequest {
    #[prost(string, tag = "1")]
    pod_sandbox_id: String,
    #[prost(bool, tag = "2")]
    verbose: bool,
}

#[derive(Clone, PartialEq, Message)]
struct PodSandboxStatusResponse {
    #[prost(message, optional, tag = "1")]
    status: Option<PodSandboxStatus>,
    #[prost(map = "string, string", tag = "2")]
    info: HashMap<String, String>,
}

#[derive(Clone, PartialEq, Message)]
struct PodSandboxStatus {
    #[prost(message, optional, tag = "5")]
    network: Option<PodSandboxNetworkStatus>,
}

#[derive(Clone, PartialEq, Message)]
struct PodSandboxNetworkStatus {
    #[prost(string, tag = "1")]
    ip: String,
    #[prost(message, repeated, tag = "2")]
    additional_ips: Vec<PodIp>,
}

#[derive(Clone, PartialEq, Message)]
struct PodIp {
    #[prost(string, tag = "1")]
    ip: String,
}

#[derive(Clone, PartialEq, Message)]
struct ListPodSandboxResponse {
    #[prost(message, repeated, tag = "1")]
    items: Vec<PodSandbox>,
}

#[derive(Clone, PartialEq, Message)]
struct PodSandbox {
    #[prost(string, tag = "1")]
    id: String,
}

#[derive(Clone, PartialEq, Message)]
struct StatusRequest {
    #[prost(bool, tag = "1")]
    verbose: bool,
}

#[derive(Clone, PartialEq, Message)]
struct StatusResponse {
    #[prost(message, optional, tag = "1")]
    status: Option<RuntimeStatus>,
}

#[derive(Clone, PartialEq, Message)]
struct RuntimeStatus {
    #[prost(message, repeated, tag = "1")]
    conditions: Vec<RuntimeCondition>,
}

#[derive(Clone, PartialEq, Message)]
struct RuntimeCondition {
    #[prost(string, tag = "1")]
    kind: String,
    #[prost(bool, tag = "2")]
    status: bool,
    #[prost(string, tag = "4")]
    message: String,
}
