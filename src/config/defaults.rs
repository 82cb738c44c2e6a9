//! What an operator who sets nothing gets.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::Duration;

use super::{
    Amqp, Auth, Config, Environment, Exec, Http, Log, LogFormat, Proc, Queue, QueueType, Sandbox, Secret,
    Topology, Worker,
};
use crate::job::Bounds;

impl Default for Config {
    fn default() -> Self {
        Self {
            amqp: Amqp {
                urls: vec![Secret::new("amqp://guest:guest@127.0.0.1:5672/%2f".into())],
                url_file: None,
                ca_file: None,
                identity: None,
                auth: Auth::Plain,
                jobs_queue: "sandpiper.jobs".into(),
                queues: vec![Queue::new("sandpiper.jobs")],
                results_queue: "sandpiper.results".into(),
                dead_queue: "sandpiper.dead".into(),
                results_max_bytes: 1 << 30,
                dead_max_bytes: 1 << 30,
                topology: Topology::Declare,
                queue_type: QueueType::Quorum,
                delivery_limit: 20,
                prefetch_surplus: 2,
                reply_to_allow: "*".into(),
                operators: Vec::new(),
                heartbeat: Duration::from_secs(10),
                connect_timeout: Duration::from_secs(10),
                operation_timeout: Duration::from_secs(10),
                reconnect_max: Duration::from_secs(30),
                max_body_bytes: 8 << 20,
                max_result_bytes: 16 << 20,
            },
            worker: Worker {
                name: String::new(),
                slots: one_a_processor(),
                drain_timeout: Duration::from_secs(25),
            },
            sandbox: Sandbox {
                shim: None,
                start_timeout: Duration::from_secs(10),
                allow_preload: false,
                allow_network: false,
                http_proxy: None,
                https_proxy: None,
                socks5_proxy: None,
                uid_base: 2_000_000,
                allow_syscalls: Vec::new(),
                require: Vec::new(),
            },
            limits: Bounds::default(),
            environments: BTreeMap::from([("default".into(), Environment::default())]),
            http: Http { listen: Some(SocketAddr::from(([127, 0, 0, 1], 9464))) },
            log: Log { level: "info".into(), format: LogFormat::Text },
        }
    }
}

impl Default for Environment {
    fn default() -> Self {
        Self {
            python: "/usr/bin/python3".into(),
            mounts: Vec::new(),
            allow_exec: Exec::Nothing,
            proc: Proc::Own,
            warm: true,
            imports: Vec::new(),
            standby: one_a_processor().max(2),
            fast_exit: true,
            huge_pages: true,
        }
    }
}

fn one_a_processor() -> usize {
    std::thread::available_parallelism().map_or(1, std::num::NonZero::get)
}
