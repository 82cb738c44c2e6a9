//! The worker against a real RabbitMQ node: what it promises about jobs, and the faults it has to survive.
//!
//! Needs `rabbitmq-server` and what `sandpiper doctor` calls required. A node takes seconds to start, so each
//! test starts one and goes through a group of scenarios with it, every scenario on queues of its own.
#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a test that cannot go on has failed, and says why"
)]

mod amqp10;
#[path = "../support/broker.rs"]
mod broker;
mod clock;
mod cluster;
mod faults;
mod fleet;
mod identity;
mod neighbours;
mod network;
mod operators;
mod oracle;
#[path = "../support/proxy.rs"]
mod proxy;
mod queues;
mod replies;
mod requester;
mod shortage;
mod shutdown;
mod soak;
mod stranger;
mod stream;
mod tls;
mod traffic;
mod worker;

use std::time::Duration;

use broker::{Cluster, Node};

/// How long anything may take that has to happen. Generous: a busy machine is no failure.
const PATIENCE: Duration = Duration::from_secs(60);

/// Waits until `condition` gives something.
async fn eventually<T>(what: &str, mut condition: impl AsyncFnMut() -> Option<T>) -> T {
    let trying = async {
        loop {
            if let Some(value) = condition().await {
                return value;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(PATIENCE, trying)
        .await
        .unwrap_or_else(|_| panic!("it never came to pass that {what}"))
}

/// Says that this machine cannot do a part; in CI that is a failure.
fn skip(why: &str) {
    assert!(std::env::var("CI").as_deref() != Ok("true"), "SKIPPED: {why}");
    println!("SKIPPED: {why}");
}

/// Names and settings of queues for one scenario.
struct Queues {
    jobs: String,
    results: String,
    dead: String,
    replies: String,
}

impl Queues {
    fn of(scenario: &str) -> Self {
        println!("--- {scenario}");
        let name = |kind: &str| format!("{scenario}.{kind}");
        Self { jobs: name("jobs"), results: name("results"), dead: name("dead"), replies: name("replies") }
    }

    fn settings(&self, more: &[&str]) -> Vec<String> {
        let mut settings = vec![
            format!("amqp.jobs_queue={}", self.jobs),
            format!("amqp.results_queue={}", self.results),
            format!("amqp.dead_queue={}", self.dead),
        ];
        settings.extend(more.iter().map(|setting| (*setting).to_owned()));
        settings
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn jobs_come_back_once_and_what_is_none_is_kept() {
    let node = Node::start();
    traffic::a_thousand_jobs_through_two_workers(&node).await;
    traffic::what_is_no_job_is_dead_lettered_and_rejected(&node).await;
    traffic::what_bodies_are_wrapped_in_is_undone(&node).await;
    traffic::what_is_not_acceptable_is_rejected_and_acked(&node).await;
    traffic::a_body_that_is_too_large_does_not_come_in(&node).await;
    traffic::poison_ends_in_the_dead_queue(&node, "quorum").await;
    traffic::poison_ends_in_the_dead_queue(&node, "classic").await;
    traffic::a_job_past_its_time_is_not_run(&node).await;
    traffic::a_job_is_cancelled_where_it_runs_and_where_it_waits(&node).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn queues_of_every_kind_are_served() {
    let node = Node::start();
    queues::a_classic_queue_redelivers_without_running_twice(&node).await;
    queues::slots_are_shared_by_weight(&node).await;
    queues::the_dead_go_back_to_where_they_came_from(&node).await;
    queues::high_priorities_come_first_in_a_classic_queue(&node).await;
    queues::high_priorities_come_first_in_a_quorum_queue(&node).await;
    queues::one_worker_is_active_until_the_next_takes_over(&node).await;
    queues::the_preferred_worker_gets_jobs_first(&node).await;
    queues::a_passive_worker_declares_nothing(&node).await;
    queues::a_passive_worker_takes_a_queue_of_another_type(&node).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn strangers_harm_nobody() {
    let node = Node::start();
    stranger::envelopes_that_no_library_writes(&node).await;
    stranger::a_message_that_the_broker_cannot_hand_on(&node).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn results_find_their_way() {
    let node = Node::start();
    replies::properties_are_as_promised(&node).await;
    replies::a_vanished_reply_queue_is_replaced_by_the_results_queue(&node).await;
    replies::direct_reply_to_is_served_alive_and_survived_dead(&node).await;
    replies::a_hostile_reply_to_harms_nobody_else(&node).await;
    replies::a_full_reply_queue_is_replaced_by_the_results_queue(&node).await;
    replies::a_vanished_dead_queue_is_declared_again(&node).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn no_reply_address_holds_up_another() {
    let node = Node::start();
    neighbours::a_reply_queue_that_refuses(&node).await;
    neighbours::a_bounded_reply_queue_whose_reader_died(&node).await;
    neighbours::a_forged_direct_address(&node).await;
    neighbours::a_reply_queue_that_never_confirms(&node).await;
    neighbours::a_reply_queue_that_is_deleted_under_way(&node).await;
    neighbours::a_publisher_without_the_right_to_its_reply_queue(&node).await;
    neighbours::a_result_that_the_broker_does_not_take(&node).await;
    neighbours::results_that_grow_as_they_are_encoded(&node).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn nobody_speaks_for_another() {
    let node = Node::start();
    identity::a_result_is_not_taken_for_anothers(&node).await;
    identity::nobody_else_counts_deliveries(&node).await;
    identity::a_job_is_cancelled_by_whoever_may(&node).await;
    identity::queues_that_nobody_reads_are_bounded(&node).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn faults_of_the_broker_are_survived() {
    let node = Node::start();
    faults::connections_closed_by_an_operator(&node).await;
    faults::the_jobs_queue_is_deleted(&node).await;
    faults::a_memory_alarm(&node).await;
    faults::restarted_and_killed(&node).await;
    faults::not_there_at_the_start(&node).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn faults_of_the_network_are_survived() {
    let node = Node::start();
    network::a_frozen_broker_is_noticed_by_its_heartbeat(&node).await;
    network::a_half_open_connection_is_noticed_by_its_heartbeat(&node).await;
    network::a_broker_that_accepts_and_is_silent(&node).await;
    network::a_confirm_that_never_comes(&node).await;
    network::killed_between_the_confirm_and_the_ack(&node).await;
    network::the_first_addresses_are_dead(&node).await;
    network::cut_off_at_any_byte_of_the_handshake(&node).await;
    network::slow_and_reset(&node).await;
    network::jobs_without_names_do_not_answer_for_each_other(&node).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn workers_come_and_go() {
    let node = Node::start();
    fleet::killed_at_full_slots(&node).await;
    fleet::rolling_restart_under_load(&node).await;
    fleet::the_same_id_twice_at_once(&node).await;
    fleet::the_next_one_takes_over_a_single_active_consumer_queue(&node).await;
    stream::output_comes_in_order_before_the_result(&node).await;
    stream::a_flood_is_sent_in_few_pieces(&node).await;
    stream::nobody_listening_delays_nothing(&node).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cluster_loses_a_node() {
    let cluster = Cluster::start();
    cluster::the_leader_is_cut_off(&cluster).await;
    cluster::the_leader_is_killed(&cluster).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_runs_out_in_the_worker_is_survived() {
    let node = Node::start();
    clock::the_clock_jumps(&node).await;
    shortage::no_descriptors_are_left(&node).await;
    shortage::no_processes_are_left(&node).await;
    shortage::no_memory_is_left(&node).await;
    shortage::the_disk_of_the_log_is_full(&node).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_operators_do_is_survived() {
    let node = Node::start();
    operators::a_queue_with_other_arguments(&node).await;
    operators::the_ack_timeout(&node).await;
    operators::a_worker_says_how_long_its_jobs_may_take(&node).await;
    operators::permissions_and_password_are_lost(&node).await;
    operators::small_frames(&node).await;
    operators::a_long_backlog(&node).await;
    // Last: the alarm is the whole node's.
    faults::a_disk_alarm(&node).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn faults_by_chance_lose_nothing() {
    let node = Node::start();
    soak::faults_by_chance(&node).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn tls_is_right_or_refused() {
    tls::the_right_authority_and_every_wrong_one().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_shows_its_certificate() {
    tls::the_workers_own_certificate_and_every_wrong_one().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_leaves_in_good_order() {
    let node = Node::start();
    shutdown::drained_under_load(&node).await;
    shutdown::what_is_only_given_back_is_no_poison(&node).await;
    shutdown::killed_at_the_end_of_the_drain_time(&node).await;
    shutdown::a_second_signal_ends_at_once(&node).await;
    shutdown::drained_while_the_broker_is_away(&node).await;
}
