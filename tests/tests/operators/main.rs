//! How operators use flannel on Docker hosts, as the guides of the Go program tell it, with what they complain of mended.
//!
//! | scene | test |
//! |---|---|
//! | 1 the first config, hosts on two LANs | `docker_hosts::the_first_guide` |
//! | 2 backend udp, the default | `docker_hosts::the_first_guide`, and flanneld_udp |
//! | 3 subnet.env makes dockerd's options | `docker_hosts::the_first_guide`; the script's flags: flanneld_flags; without dockerd's options: docker_guides |
//! | 4 web servers in containers on two hosts | `docker_hosts::the_first_guide` |
//! | 5 vxlan while everything runs, another VNI | `docker_hosts::the_first_guide`; to the letter: flanneld_backends |
//! | 6 host-gw, and no config yet | `routed_hosts::the_second_guide`; said once: flanneld_faults `a_config_that_comes_late_is_waited_for` |
//! | 7 three subnets for four hosts | flanneld_faults `the_host_for_whom_no_subnet_is_left_gets_one_once_there_is` |
//! | 8 `--iface=eth1` | `routed_hosts::the_second_guide` |
//! | 9 `--public-ip` behind NAT | `docker_hosts::the_first_guide`; host-gw refuses: plan `host_gw_behind_nat_plans_nothing_and_says_why` |
//! | 10 another prefix, one host after the other changes its backend, `kill -9` | `routed_hosts::the_second_guide`; renewal: store; MTU of a bridge of ours: docker_networks |
//! | 11 routes by hand | `routed_hosts::the_second_guide` |
//! | 12 `VxLAN` with `Directrouting` | flanneld_backends `direct_routing_tunnels_only_to_those_behind_the_router` |
//! | 13 TLS, `--help`, `ethtool -i` | etcd_access; flanneld_faults `what_cannot_be_served_is_refused_by_name`; `docker_hosts::the_first_guide` |

mod docker_hosts;
mod routed_hosts;
