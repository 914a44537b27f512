//! The commands. Each is a shell script that runs twice: with `$N` a network of Docker's bridge driver, and with `$N` one of ours.
//! What it prints and its exit status must be the same.
//!
//! Variables: `$N` the network and `$A` its addresses without the last number (`10.100.5.`); `$D` the options after `docker network
//! create` that choose driver and pool, `$B` the addresses of a network so made, `$E` those of one that shares nothing with `$N`, `$Y` the first ones for compose; `$C` prefix for names
//! of containers and networks, `$I` the image, `$P` first of a hundred host ports that nobody else uses, `$H` the host's address.

/// A command and, if both drivers differ there, why.
pub(crate) struct Case {
    pub(crate) name: &'static str,
    pub(crate) script: &'static str,
    /// The text of docs/reference/docker.md that explains it.
    pub(crate) differs: Option<&'static str>,
}

const fn same(name: &'static str, script: &'static str) -> Case {
    Case { name, script, differs: None }
}

const fn differs(name: &'static str, script: &'static str, why: &'static str) -> Case {
    Case { name, script, differs: Some(why) }
}

pub(crate) const CASES: &[Case] = &[
    // --- networks ------------------------------------------------------------------------------------------------------
    same(
        "network create",
        "docker network create $D ${C}n >/dev/null && docker network inspect -f '{{.Name}} {{.Scope}} {{.Internal}} {{.EnableIPv6}} {{.Attachable}} {{.Ingress}}' ${C}n; docker network rm ${C}n",
    ),
    same("network create: the name is taken", "docker network create $D $N"),
    same(
        "network create --label, network ls --filter",
        "docker network create $D --label tier=$C ${C}n >/dev/null; docker network ls --filter label=tier=$C --format '{{.Name}} {{.Scope}}'; docker network rm ${C}n",
    ),
    same(
        "network create --attachable",
        "docker network create $D --attachable ${C}n >/dev/null; docker network inspect -f '{{.Attachable}}' ${C}n; docker network rm ${C}n",
    ),
    same(
        "network create --internal: no way out, neighbours reach each other",
        "docker network create $D --internal ${C}n >/dev/null; docker run -d --name ${C}a --network ${C}n $I sleep 99 >/dev/null; docker run --rm --network ${C}n $I sh -c \"ping -c1 -W2 ${C}a >/dev/null && echo neighbour; ping -c1 -W1 10.77.0.1 >/dev/null || echo no way out\"; docker rm -f ${C}a; docker network rm ${C}n",
    ),
    same(
        "network create --ip-range",
        "docker network create $D --ip-range ${B}128/25 ${C}n >/dev/null; docker run --rm --network ${C}n $I sh -c 'ip -4 -o addr show dev eth0 | grep -o \"inet [0-9.]*\" | cut -d. -f4 | { read n; [ $n -ge 128 ] && echo in range; }'; docker network rm ${C}n",
    ),
    same(
        "network create --aux-address",
        "docker network create $D --aux-address router=${B}77 ${C}n >/dev/null; docker run --rm --network ${C}n --ip ${B}77 $I true >/dev/null 2>&1; echo $?; docker network rm ${C}n",
    ),
    same(
        "network create --gateway: the first address",
        "docker network create $D --gateway ${B}1 ${C}n >/dev/null; docker run --rm --network ${C}n $I ip route | grep ^default; docker network rm ${C}n",
    ),
    same(
        "network create -o com.docker.network.driver.mtu",
        "docker network create $D -o com.docker.network.driver.mtu=1300 ${C}n >/dev/null; docker run --rm --network ${C}n $I cat /sys/class/net/eth0/mtu; docker network rm ${C}n",
    ),
    same(
        "network create -o com.docker.network.bridge.enable_icc=false",
        "docker network create $D -o com.docker.network.bridge.enable_icc=false ${C}n >/dev/null; docker run -d --name ${C}a --network ${C}n $I sleep 99 >/dev/null; docker run --rm --network ${C}n $I ping -c1 -W1 ${C}a >/dev/null || echo kept apart; docker rm -f ${C}a; docker network rm ${C}n",
    ),
    same(
        "network create -o com.docker.network.bridge.enable_ip_masquerade=false",
        "docker network create $D -o com.docker.network.bridge.enable_ip_masquerade=false ${C}n >/dev/null; docker network inspect -f '{{json .Options}}' ${C}n; docker network rm ${C}n",
    ),
    same(
        "network create -o com.docker.network.bridge.host_binding_ipv4",
        "docker network create $D -o com.docker.network.bridge.host_binding_ipv4=127.0.0.1 ${C}n >/dev/null; docker run -d --name ${C}a --network ${C}n -p $((P+1)):80 $I httpd -f -h /etc >/dev/null; sleep 0.3; timeout 2 busybox wget -qO- http://127.0.0.1:$((P+1))/hostname >/dev/null && echo by loopback; timeout 1 busybox wget -qO- http://$H:$((P+1))/hostname >/dev/null 2>&1 || echo not by $H; docker rm -f ${C}a; docker network rm ${C}n",
    ),
    same(
        "network create -o com.docker.network.container_iface_prefix",
        "docker network create $D -o com.docker.network.container_iface_prefix=lan ${C}n >/dev/null; docker run --rm --network ${C}n $I ls /sys/class/net; docker network rm ${C}n",
    ),
    same(
        "network inspect: pool, gateway, containers",
        "docker run -d --name ${C}a --network $N --ip ${A}30 $I sleep 99 >/dev/null; docker network inspect -f '{{range .Containers}}{{.Name}} {{.IPv4Address}}{{end}}' $N; docker rm -f ${C}a",
    ),
    differs(
        "network inspect: the subnet that was asked for",
        "docker network inspect -f '{{(index .IPAM.Config 0).Subnet}}' $N",
        "inspect shows the whole flannel network",
    ),
    same(
        "network rm: in use",
        "docker run -d --name ${C}a --network $N $I sleep 99 >/dev/null; docker network rm $N 2>&1 | grep -o 'has active endpoints'; docker rm -f ${C}a",
    ),
    same("network rm: unknown", "docker network rm ${C}nowhere"),
    same(
        "network prune",
        "docker network create $D --label prune=$C ${C}n >/dev/null; docker network prune -f --filter label=prune=$C",
    ),
    same(
        "network ls",
        "docker network ls --filter name=^$N$ --format '{{.Name}} {{.Scope}} {{.Internal}} {{.IPv6}}'",
    ),
    // --- run -----------------------------------------------------------------------------------------------------------
    same("run --rm", "docker run --rm --network $N $I echo hello"),
    same("run: exit status", "docker run --rm --network $N $I sh -c 'exit 7'"),
    same(
        "run: a command that does not exist",
        "docker run --rm --network $N $I nothing 2>/dev/null; echo $?",
    ),
    same(
        "run --ip",
        "docker run --rm --network $N --ip ${A}40 $I ip -4 -o addr show dev eth0 | grep -o 'inet [0-9./]*'",
    ),
    same(
        "run --ip: taken",
        "docker run -d --name ${C}a --network $N --ip ${A}41 $I sleep 99 >/dev/null; docker run --rm --network $N --ip ${A}41 $I true >/dev/null 2>&1; echo $?; docker rm -f ${C}a",
    ),
    same("run --ip: outside", "docker run --rm --network $N --ip 192.0.2.1 $I true >/dev/null 2>&1; echo $?"),
    same(
        "run --mac-address",
        "docker run --rm --network $N --mac-address 02:11:22:33:44:55 $I cat /sys/class/net/eth0/address",
    ),
    same(
        "run --hostname, --domainname",
        "docker run --rm --network $N --hostname web --domainname example.org $I sh -c 'hostname; hostname -f'",
    ),
    same(
        "run --network-alias",
        "docker run -d --name ${C}a --network $N --network-alias ${C}db $I sleep 99 >/dev/null; docker run --rm --network $N $I ping -c1 -W2 ${C}db | grep -o '1 packets received'; docker rm -f ${C}a",
    ),
    same(
        "run: names by embedded DNS",
        "docker run -d --name ${C}a --network $N $I sleep 99 >/dev/null; docker run --rm --network $N $I sh -c \"grep nameserver /etc/resolv.conf; nslookup ${C}a | grep -c Name:; ping -c1 -W2 ${C}a.$N | grep -o '1 packets received'\"; docker rm -f ${C}a",
    ),
    same(
        "run: a container's own names",
        "docker run --rm --name ${C}a --network $N $I sh -c \"ping -c1 -W2 ${C}a | grep -o '1 packets received'; ping -c1 -W2 \\$(hostname) | grep -o '1 packets received'\"",
    ),
    same(
        "run --dns, --dns-search",
        "docker run --rm --network $N --dns 192.0.2.53 --dns-search example.org $I cat /etc/resolv.conf | grep -v '^#' | grep -v ExtServers",
    ),
    same("run --add-host", "docker run --rm --network $N --add-host db:192.0.2.7 $I grep db /etc/hosts"),
    same(
        "run --link",
        "docker run -d --name ${C}a --network $N $I sleep 99 >/dev/null; docker run --rm --network $N --link ${C}a:store $I ping -c1 -W2 store | grep -o '1 packets received'; docker rm -f ${C}a",
    ),
    same(
        "run --expose",
        "docker run -d --name ${C}a --network $N --expose 81 $I sleep 99 >/dev/null; docker inspect -f '{{json .Config.ExposedPorts}}' ${C}a; docker rm -f ${C}a",
    ),
    same(
        "run --sysctl net.",
        "docker run --rm --network $N --sysctl net.ipv4.ip_default_ttl=42 $I cat /proc/sys/net/ipv4/ip_default_ttl",
    ),
    same(
        "run --cap-add NET_ADMIN",
        "docker run --rm --network $N --cap-add NET_ADMIN $I sh -c 'ip link set dev eth0 mtu 1200 && cat /sys/class/net/eth0/mtu'",
    ),
    same(
        "run --network container:",
        "docker run -d --name ${C}a --network $N --ip ${A}42 $I sleep 99 >/dev/null; docker run --rm --network container:${C}a $I ip -4 -o addr show dev eth0 | grep -o 'inet [0-9./]*'; docker rm -f ${C}a",
    ),
    same(
        "run: default route and interface",
        "docker run --rm --network $N $I sh -c 'ls /sys/class/net; ip route | grep ^default'",
    ),
    differs(
        "run: routes",
        "docker run --rm --network $N $I ip route",
        "a route to the whole flannel network",
    ),
    same(
        "run: the host is reached by the gateway",
        "docker run --rm --network $N $I ping -c1 -W2 ${A}1 | grep -o '1 packets received'",
    ),
    same(
        "run: the outside is reached",
        "docker run --rm --network $N $I ping -c1 -W2 10.77.0.1 | grep -o '1 packets received'",
    ),
    same(
        "create, start, wait, logs, rm",
        "docker create --name ${C}a --network $N $I echo started >/dev/null; docker start ${C}a; docker wait ${C}a; docker logs ${C}a; docker rm ${C}a",
    ),
    // --- life ----------------------------------------------------------------------------------------------------------
    same(
        "stop, start: --ip stays",
        "docker run -d --name ${C}a --network $N --ip ${A}43 $I sleep 99 >/dev/null; docker stop -t0 ${C}a; docker start ${C}a; docker inspect -f '{{(index .NetworkSettings.Networks \"'$N'\").IPAddress}}' ${C}a; docker rm -f ${C}a",
    ),
    same(
        "restart",
        "docker run -d --name ${C}a --network $N $I sleep 99 >/dev/null; docker restart -t0 ${C}a; docker run --rm --network $N $I ping -c1 -W2 ${C}a | grep -o '1 packets received'; docker rm -f ${C}a",
    ),
    same(
        "pause, unpause",
        "docker run -d --name ${C}a --network $N $I sleep 99 >/dev/null; docker pause ${C}a; docker unpause ${C}a; docker run --rm --network $N $I ping -c1 -W2 ${C}a | grep -o '1 packets received'; docker rm -f ${C}a",
    ),
    same(
        "kill, ps",
        "docker run -d --name ${C}a --network $N $I sleep 99 >/dev/null; docker kill ${C}a; docker ps -a --filter name=${C}a --format '{{.Names}} {{.State}}'; docker rm ${C}a",
    ),
    same(
        "rename: the new name resolves",
        "docker run -d --name ${C}a --network $N $I sleep 99 >/dev/null; docker rename ${C}a ${C}b; docker run --rm --network $N $I ping -c1 -W2 ${C}b | grep -o '1 packets received'; docker rm -f ${C}b",
    ),
    same(
        "exec",
        "docker run -d --name ${C}a --network $N $I sleep 99 >/dev/null; docker exec ${C}a ip -4 -o addr show dev eth0 | grep -c inet; docker rm -f ${C}a",
    ),
    same(
        "update, top, cp, commit",
        "docker run -d --name ${C}a --network $N $I sleep 99 >/dev/null; docker update --restart no ${C}a; docker top ${C}a -o args | tail -1; docker cp ${C}a:/etc/hostname - | wc -c; docker commit -q ${C}a ${C}image >/dev/null && docker rmi ${C}image >/dev/null && echo committed; docker rm -f ${C}a",
    ),
    same(
        "stats",
        "docker run -d --name ${C}a --network $N $I sleep 99 >/dev/null; docker stats --no-stream --format '{{.Name}}' ${C}a; docker rm -f ${C}a",
    ),
    same(
        "inspect: address, gateway, MAC of the shape",
        "docker run -d --name ${C}a --network $N --ip ${A}44 $I sleep 99 >/dev/null; docker inspect -f '{{with index .NetworkSettings.Networks \"'$N'\"}}{{.IPAddress}}/{{.IPPrefixLen}} {{.Gateway}} {{len .MacAddress}}{{end}}' ${C}a; docker rm -f ${C}a",
    ),
    same(
        "restart policy",
        "docker run -d --name ${C}a --network $N --restart on-failure:1 $I sh -c 'exit 3' >/dev/null; for n in 1 2 3 4 5 6 7 8 9; do [ \"$(docker inspect -f '{{.State.Status}} {{.RestartCount}}' ${C}a)\" = 'exited 1' ] && break; sleep 0.3; done; docker inspect -f '{{.State.Status}} {{.RestartCount}}' ${C}a; docker rm -f ${C}a",
    ),
    // --- connect -------------------------------------------------------------------------------------------------------
    same(
        "network connect, disconnect while running",
        "docker run -d --name ${C}a --network none $I sleep 99 >/dev/null; docker network disconnect none ${C}a; docker network connect $N ${C}a; docker exec ${C}a ls /sys/class/net; docker network disconnect $N ${C}a; docker exec ${C}a ls /sys/class/net; docker rm -f ${C}a",
    ),
    same(
        "network connect --ip --alias",
        "docker run -d --name ${C}a $I sleep 99 >/dev/null; docker network connect --ip ${A}45 --alias ${C}extra $N ${C}a; docker exec ${C}a ip -4 -o addr show dev eth1 | grep -o 'inet [0-9./]*'; docker run --rm --network $N $I ping -c1 -W2 ${C}extra | grep -o '1 packets received'; docker rm -f ${C}a",
    ),
    same(
        "network connect: a container that is stopped",
        "docker create --name ${C}a --network none $I ls /sys/class/net >/dev/null; docker network disconnect none ${C}a; docker network connect $N ${C}a; docker start -a ${C}a; docker rm ${C}a",
    ),
    same(
        "network connect: twice",
        "docker run -d --name ${C}a --network $N $I sleep 99 >/dev/null; docker network connect $N ${C}a 2>&1 | grep -o 'already exists in network'; docker rm -f ${C}a",
    ),
    same(
        "network disconnect -f",
        "docker run -d --name ${C}a --network $N $I sleep 99 >/dev/null; docker network disconnect -f $N ${C}a; docker exec ${C}a ls /sys/class/net; docker rm -f ${C}a",
    ),
    same(
        "two networks at once",
        "docker network create $E ${C}n >/dev/null; docker run -d --name ${C}a --network $N $I sleep 99 >/dev/null; docker network connect ${C}n ${C}a; docker exec ${C}a ls /sys/class/net; docker run --rm --network ${C}n $I ping -c1 -W2 ${C}a | grep -o '1 packets received'; docker rm -f ${C}a; docker network rm ${C}n",
    ),
    // --- published ports -----------------------------------------------------------------------------------------------
    same(
        "run -p: from the host",
        "docker run -d --name ${C}a --network $N -p $((P+10)):80 $I httpd -f -h /etc >/dev/null; sleep 0.3; for at in 127.0.0.1 $H ${A}1; do timeout 2 busybox wget -qO- http://$at:$((P+10))/hostname | wc -c; done; docker rm -f ${C}a",
    ),
    same(
        "run -p: from a neighbour and from itself",
        "docker run -d --name ${C}a --network $N -p $((P+11)):80 $I httpd -f -h /etc >/dev/null; sleep 0.3; docker exec ${C}a timeout 2 busybox wget -qO- http://$H:$((P+11))/hostname | wc -c; docker run --rm --network $N $I timeout 2 busybox wget -qO- http://$H:$((P+11))/hostname | wc -c; docker rm -f ${C}a",
    ),
    same(
        "run -p: a host address",
        "docker run -d --name ${C}a --network $N -p 127.0.0.1:$((P+12)):80 $I httpd -f -h /etc >/dev/null; sleep 0.3; timeout 2 busybox wget -qO- http://127.0.0.1:$((P+12))/hostname | wc -c; timeout 1 busybox wget -qO- http://$H:$((P+12))/hostname 2>/dev/null | wc -c; docker rm -f ${C}a",
    ),
    same(
        "run -p: a range",
        "docker run -d --name ${C}a --network $N -p $((P+20))-$((P+22)):80-82 $I sh -c 'httpd -p 80 -h /etc; httpd -p 81 -h /etc; httpd -p 82 -h /etc; sleep 99' >/dev/null; sleep 0.3; for n in 20 21 22; do timeout 2 busybox wget -qO- http://127.0.0.1:$((P+n))/hostname | wc -c; done; docker rm -f ${C}a",
    ),
    same(
        "run -p: udp",
        "docker run -d --name ${C}a --network $N -p $((P+30)):53/udp $I sleep 99 >/dev/null; timeout 5 nsenter -t $(docker inspect -f '{{.State.Pid}}' ${C}a) -n python3 -c \"import socket; s=socket.socket(2,2); s.bind(('0.0.0.0',53)); [s.sendto(b'answer\\n', s.recvfrom(9)[1]) for _ in (1,2)]\" & sleep 0.5; for at in $H 127.0.0.1; do bash -c \"exec 3<>/dev/udp/$at/$((P+30)); echo x >&3; timeout 2 head -n 1 <&3\"; done; docker rm -f ${C}a",
    ),
    same(
        "run -p: the port is taken",
        "docker run -d --name ${C}a --network $N -p $((P+13)):80 $I sleep 99 >/dev/null; docker run --rm --network $N -p $((P+13)):80 $I true >/dev/null 2>&1; echo $?; docker rm -f ${C}a",
    ),
    same(
        "run -p: the port comes back with the container",
        "docker run -d --name ${C}a --network $N -p $((P+14)):80 $I httpd -f -h /etc >/dev/null; docker stop -t0 ${C}a >/dev/null; timeout 1 busybox wget -qO- http://$H:$((P+14))/hostname 2>/dev/null | wc -c; docker start ${C}a >/dev/null; sleep 0.3; timeout 2 busybox wget -qO- http://$H:$((P+14))/hostname | wc -c; docker rm -f ${C}a",
    ),
    differs(
        "port, ps: published ports are shown",
        "docker run -d --name ${C}a --network $N -p $((P+15)):80 $I sleep 99 >/dev/null; docker port ${C}a | grep -c 0.0.0.0; docker rm -f ${C}a",
        "docker ps and docker port show no published ports",
    ),
    differs(
        "run -P",
        "docker run -d --name ${C}a --network $N -P --expose 80 $I httpd -f -h /etc >/dev/null; docker port ${C}a 80/tcp | grep -c 0.0.0.0; docker rm -f ${C}a",
        "docker ps and docker port show no published ports",
    ),
    // --- compose -------------------------------------------------------------------------------------------------------
    same(
        "compose: an external network",
        "mkdir -p /run/$C-e; printf 'version: \"3.5\"\\nservices:\\n  a:\\n    image: '$I'\\n    command: sleep 99\\n    networks: {n: {ipv4_address: '${A}50', aliases: [store]}}\\n  b:\\n    image: '$I'\\n    command: sh -c \"ping -c1 -W2 a && ping -c1 -W2 store && sleep 99\"\\n    depends_on: [a]\\n    networks: [n]\\nnetworks: {n: {external: true, name: '$N'}}\\n' > /run/$C-e/docker-compose.yml; cd /run/$C-e; docker-compose --no-ansi up -d 2>/dev/null; for n in 1 2 3 4 5 6 7 8; do docker-compose logs b 2>/dev/null | grep -c '1 packets received' | grep -q 2 && break; sleep 0.3; done; docker-compose logs b 2>/dev/null | grep -o '1 packets received'; docker-compose ps -q | wc -l; docker-compose down -t0 2>/dev/null; echo $?; rm -rf /run/$C-e",
    ),
    same(
        "compose: a network of its own, scale, restart, down",
        "mkdir -p /run/$C-o; printf 'version: \"3.5\"\\nservices:\\n  a:\\n    image: '$I'\\n    command: sleep 99\\n    networks: [n]\\nnetworks:\\n  n:\\n'\"$Y\" > /run/$C-o/docker-compose.yml; cd /run/$C-o; docker-compose up -d --scale a=2 2>/dev/null; docker-compose ps -q | wc -l; docker-compose exec -T a ping -c1 -W2 ${C}-o_a_2 2>/dev/null | grep -o '1 packets received'; docker-compose restart -t0 2>/dev/null; docker-compose exec -T a ping -c1 -W2 ${C}-o_a_2 2>/dev/null | grep -o '1 packets received'; docker-compose down -t0 2>/dev/null; echo $?; docker network ls -q --filter name=${C}-o_n | wc -l; rm -rf /run/$C-o",
    ),
    same(
        "compose: published ports",
        "mkdir -p /run/$C-p; printf 'version: \"3.5\"\\nservices:\\n  a:\\n    image: '$I'\\n    command: httpd -f -h /etc\\n    ports: [\"'$((P+40))':80\"]\\n    networks: [n]\\nnetworks: {n: {external: true, name: '$N'}}\\n' > /run/$C-p/docker-compose.yml; cd /run/$C-p; docker-compose up -d 2>/dev/null; sleep 0.3; timeout 2 busybox wget -qO- http://$H:$((P+40))/hostname | wc -c; docker-compose down -t0 2>/dev/null; echo $?; rm -rf /run/$C-p",
    ),
    // --- the engine ----------------------------------------------------------------------------------------------------
    same(
        "events",
        "since=$(date +%s.%N); docker run --rm --network $N $I true; docker events --since $since --until $(($(date +%s)+1)) --filter type=network --filter network=$N --format '{{.Action}}' | grep -v create",
    ),
    same(
        "container prune",
        "docker run --name ${C}a --network $N --label prune=$C $I true; docker container prune -f --filter label=prune=$C | head -1",
    ),
    same(
        "system df, volume ls, info",
        "docker system df >/dev/null && docker volume ls >/dev/null && docker info >/dev/null 2>&1 && echo answered",
    ),
];
