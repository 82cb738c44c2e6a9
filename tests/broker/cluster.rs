//! Three nodes that hold the queues together, and what becomes of jobs when one of them goes, or is cut off.

use std::collections::HashSet;
use std::time::{Duration, Instant};

use crate::broker::Cluster;
use crate::requester::{Load, Requester};
use crate::worker::Worker;
use crate::{Queues, eventually, oracle};

/// What "in seconds" may be on a busy machine. Nothing here waits for a timer of the broker's: those are a
/// minute and longer.
const SECONDS: Duration = Duration::from_secs(30);

/// The one that is lost.
const LOST: usize = 0;

/// Two workers, and somebody who asks without a pause.
struct Scene {
    queues: Queues,
    /// At the node that is lost, which leads the queues because this worker declared them there.
    near: Worker,
    /// At one that is not.
    far: Worker,
    requester: Requester,
    load: Load,
}

impl Scene {
    async fn under_load(cluster: &Cluster, name: &str) -> Self {
        let queues = Queues::of(name);
        // A node of 4.3 that is cut off lets its clients be: only that it no longer answers tells them.
        let settings = queues.settings(&["worker.slots=2", "amqp.operation_timeout_ms=5000"]);
        let near = Worker::ready(&cluster.urls(LOST), &settings).await;
        let far = Worker::ready(&cluster.urls(1), &settings).await;
        assert_eq!(cluster.leader(2, &queues.jobs), LOST);
        let requester = Requester::connect(cluster.node(2).url()).await;
        requester.declare_on_all_nodes(&queues.replies).await;
        // A little less than two workers can do.
        let pause = Duration::from_millis(200);
        let load = Load::start(cluster.node(2).url(), &queues, 0.4, pause).await;
        for worker in [&near, &far] {
            eventually("both work", async || (succeeded(worker) >= 2.0).then_some(())).await;
        }
        Self { queues, near, far, requester, load }
    }

    /// Waits until the worker that lost its node is at another one, and both have done more than before.
    async fn goes_on_elsewhere(&self, cluster: &Cluster) {
        let begin = Instant::now();
        let elsewhere = [1, 2].map(|at| host(cluster.node(at).url()));
        eventually("the worker is at another node", async || {
            let log = self.near.log();
            let connected: Vec<_> =
                log.lines().filter(|line| line.contains("connected to the broker")).collect();
            let moved = |role: &str| {
                connected
                    .iter()
                    .any(|line| line.contains(role) && elsewhere.iter().any(|host| line.contains(host)))
            };
            (moved("\"consume\"") && moved("\"publish\"")).then_some(())
        })
        .await;
        self.near.until_ready().await;
        let moved = begin.elapsed();
        let before = [succeeded(&self.near), succeeded(&self.far)];
        eventually("both go on", async || {
            (succeeded(&self.near) > before[0] && succeeded(&self.far) > before[1]).then_some(())
        })
        .await;
        println!("at another node after {moved:.2?}; both work after {:.2?}", begin.elapsed());
        assert!(begin.elapsed() < SECONDS, "{:?}", begin.elapsed());
    }

    /// The cluster is whole again: nothing was lost.
    async fn ends_well(mut self, cluster: &Cluster) {
        eventually("all nodes run", async || (cluster.running(1) == 3).then_some(())).await;
        let ids = self.load.end().await;
        // Acks that had not reached most of the nodes are lost, and which these are nobody outside can tell.
        let doubled: HashSet<String> = ids.iter().cloned().collect();
        let workers = &mut [&mut self.near, &mut self.far];
        let mut replies = self.requester.listen(&self.queues.replies).await;
        oracle::holds(cluster.node(1), workers, &self.queues, &mut replies, &ids, &doubled).await;
    }
}

fn succeeded(worker: &Worker) -> f64 {
    worker.metric("sandpiper_jobs_completed_total{status=\"succeeded\"}")
}

fn host(url: &str) -> String {
    url.rsplit_once('@').unwrap().1.split('/').next().unwrap().to_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn the_leader_is_killed() {
    let cluster = &Cluster::start();
    let scene = Scene::under_load(cluster, "leader").await;
    cluster.node(LOST).kill();
    scene.goes_on_elsewhere(cluster).await;
    assert_ne!(cluster.leader(2, &scene.queues.jobs), LOST);
    cluster.node(LOST).start_again();
    scene.ends_well(cluster).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_leader_is_cut_off() {
    let cluster = &Cluster::start();
    let scene = Scene::under_load(cluster, "partition").await;
    cluster.cut_off(LOST);
    // It pauses, and closes the door to its clients; or, since 4.3, goes on and confirms nothing.
    scene.goes_on_elsewhere(cluster).await;
    assert_eq!(cluster.running(1), 2, "it was not cut off");
    cluster.reunite(LOST);
    scene.ends_well(cluster).await;
}
