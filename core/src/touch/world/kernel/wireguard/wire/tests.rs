use super::*;

fn link() -> LinkName {
    LinkName::new("flannel-wg").unwrap()
}

fn bytes(message: &Message) -> Vec<u8> {
    let mut bytes = vec![0; message.buffer_len()];
    message.serialize(&mut bytes);
    bytes
}

fn peer(key: u8, endpoint: &str, allowed: &[&str]) -> WireguardPeer {
    WireguardPeer {
        link: link(),
        key: PublicKey([key; 32]),
        shared: Some(Secret::new([9; 32])),
        endpoint: Some(endpoint.parse().unwrap()),
        roams: false,
        keepalive: 25,
        allowed: allowed.iter().map(|prefix| prefix.parse().unwrap()).collect(),
    }
}

fn seen(messages: &[Vec<u8>]) -> Vec<Fact> {
    let mut said = Said::new(link());
    messages.iter().for_each(|message| said.read(message));
    said.into_facts().collect()
}

#[test]
fn what_is_written_is_read_back() {
    let device = WireguardDevice { link: link(), key: Secret::new([3; 32]), port: Port::WIREGUARD };
    let both = peer(1, "192.0.2.1:51820", &["10.100.2.0/24", "fd42:cafe:0:1::/64"]);
    let v6 = peer(2, "[fd00:100::2]:51821", &["fd42:cafe:0:2::/64"]);
    let plain = WireguardPeer { shared: None, keepalive: 0, ..peer(4, "192.0.2.4:1", &["10.100.4.0/24"]) };
    let mut message = Message::set(30, link());
    message.device(&device);
    for peer in [&both, &v6, &plain] {
        message.peer(peer, None);
    }
    let expected: Vec<_> = std::iter::once(Fact::WireguardDevice(device))
        .chain([both, v6, plain].map(|peer| Fact::WireguardPeer(Box::new(peer))))
        .collect();
    assert_eq!(seen(&[bytes(&message)]), expected);
    assert_eq!((message.message_type(), message.bytes[0], message.bytes[1]), (30, 1, 1));
}

#[test]
fn the_bytes_are_those_of_the_kernels_headers() {
    let mut message = Message::set(30, link());
    message.remove(&PublicKey([7; 32]));
    let mut expected = vec![1, 1, 0, 0, 15, 0, 2, 0];
    expected.extend(b"flannel-wg\0\0");
    expected.extend([52, 0, 8, 0x80, 48, 0, 0, 0x80, 36, 0, 1, 0]);
    expected.extend([7; 32]);
    expected.extend([8, 0, 3, 0, 1, 0, 0, 0]);
    assert_eq!(bytes(&message), expected);
    assert_eq!(bytes(&Message::get(30, 5)), [0, 1, 0, 0, 8, 0, 1, 0, 5, 0, 0, 0]);
    let endpoint = socket_address("192.0.2.1:51820".parse().unwrap());
    assert_eq!(endpoint, [2, 0, 0xca, 0x6c, 192, 0, 2, 1, 0, 0, 0, 0, 0, 0, 0, 0]);
    let endpoint = socket_address("[fd00::1]:51820".parse().unwrap());
    assert_eq!((endpoint.len(), &endpoint[..10]), (28, &[10, 0, 0xca, 0x6c, 0, 0, 0, 0, 0xfd, 0][..]));
}

#[test]
fn of_a_peer_that_is_there_only_what_differs_is_said() {
    let old = peer(1, "192.0.2.1:51820", &["10.100.2.0/24"]);
    let said = |new: &WireguardPeer| {
        let mut message = Message::set(30, link());
        message.peer(new, Some(&old));
        let peers = message.peers;
        let (_, peer) = attributes(&peers).next().unwrap();
        attributes(peer).map(|(kind, _)| kind).collect::<Vec<_>>()
    };
    assert_eq!(said(&old), [WGPEER_A_PUBLIC_KEY]);
    let moved = WireguardPeer { endpoint: "192.0.2.9:51820".parse().ok(), ..old.clone() };
    assert_eq!(said(&moved), [WGPEER_A_PUBLIC_KEY, WGPEER_A_ENDPOINT]);
    // One that roams stays where it went.
    let roams = WireguardPeer { roams: true, keepalive: 0, ..moved };
    assert_eq!(said(&roams), [WGPEER_A_PUBLIC_KEY, WGPEER_A_PERSISTENT_KEEPALIVE_INTERVAL]);
    let bare = WireguardPeer { shared: None, allowed: BTreeSet::new(), ..old.clone() };
    assert_eq!(
        said(&bare),
        [WGPEER_A_PUBLIC_KEY, WGPEER_A_PRESHARED_KEY, WGPEER_A_FLAGS, WGPEER_A_ALLOWEDIPS]
    );
}

#[test]
fn a_peer_that_does_not_fit_goes_on_in_the_next_message() {
    let mut first = Message::set(30, link());
    first.peer(&peer(1, "192.0.2.1:51820", &["10.100.2.0/24"]), None);
    // What the kernel sends then: key and further networks only.
    let mut rest = Vec::new();
    put(&mut rest, WGPEER_A_PUBLIC_KEY, &[1; 32]);
    let mut allowed = Vec::new();
    put(&mut allowed, NLA_F_NESTED, &allowed_ip(&"10.100.3.0/24".parse().unwrap()));
    put(&mut rest, WGPEER_A_ALLOWEDIPS | NLA_F_NESTED, &allowed);
    let mut second = Message::new(30, 0, 1);
    second.nest(&rest);
    let whole = peer(1, "192.0.2.1:51820", &["10.100.2.0/24", "10.100.3.0/24"]);
    assert_eq!(seen(&[bytes(&first), bytes(&second)]), [Fact::WireguardPeer(Box::new(whole))]);
}

#[test]
fn silent_is_who_was_sent_something_and_never_agreed() {
    let stats = |key: u8, sent: u64, met: u64| {
        let mut peer = Vec::new();
        put(&mut peer, WGPEER_A_PUBLIC_KEY, &[key; 32]);
        put(&mut peer, WGPEER_A_TX_BYTES, &sent.to_ne_bytes());
        put(&mut peer, WGPEER_A_LAST_HANDSHAKE_TIME, &[met.to_ne_bytes(), [0; 8]].concat());
        peer
    };
    let mut message = Message::new(30, 0, 1);
    for peer in [stats(1, 148, 0), stats(2, 148, 1_700_000_000), stats(3, 0, 0)] {
        message.nest(&peer);
    }
    let mut said = Said::new(link());
    said.read(&bytes(&message));
    assert_eq!(said.silent().collect::<Vec<_>>(), [PublicKey([1; 32])]);
}

#[test]
fn broken_bytes_are_no_facts() {
    let mut message = Message::set(30, link());
    message.peer(&peer(1, "192.0.2.1:51820", &["10.100.2.0/24"]), None);
    let whole = bytes(&message);
    for cut in 0..whole.len() {
        let _ = seen(&[whole[..cut].to_vec()]);
    }
    assert_eq!(seen(&[vec![0, 1]]), []);
    assert_eq!(endpoint_of(&[2, 0, 1]), None);
    assert_eq!(family(16, &[1, 2, 0, 0, 6, 0, 1, 0, 30, 0, 0, 0]), Some(30));
    assert_eq!(family(2, &[1, 2, 0, 0, 6, 0, 1, 0, 30, 0, 0, 0]), None);
}
