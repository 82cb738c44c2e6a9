//! A clock that jumps under a worker. Timers are monotonic and do not follow it; what names a moment of the day, a
//! deadline and the times in a result, does.
//!
//! The clock of this machine is left alone: `libfaketime` stands between the worker and its wall clock, and reads
//! how far to shift it from a file, anew each time. Jobs never have it: their environment is made for them.

use std::path::{Path, PathBuf};
use std::time::Duration;

use lapin::BasicProperties;
use serde_json::{Value, json};

use crate::broker::Node;
use crate::requester::{Requester, next};
use crate::worker::{Surroundings, Worker};
use crate::{Queues, eventually, skip};

const DAY: i64 = 86_400;

/// What no job here takes, and no histogram should show.
const HOUR: f64 = 3_600.0;

fn library() -> Option<PathBuf> {
    let machines = std::fs::read_dir("/usr/lib").ok()?.flatten();
    machines.map(|machine| machine.path().join("faketime/libfaketime.so.1")).find(|path| path.exists())
}

fn shift(file: &Path, seconds: i64) {
    // At once or not at all: the worker reads it all the time.
    let new = file.with_extension("new");
    std::fs::write(&new, format!("{seconds:+}\n")).unwrap();
    std::fs::rename(new, file).unwrap();
}

fn stamp(result: &Value, field: &str) -> i64 {
    result[field]
        .as_str()
        .unwrap_or_else(|| panic!("{result}"))
        .parse::<jiff::Timestamp>()
        .unwrap()
        .as_second()
}

#[tokio::test(flavor = "multi_thread")]
async fn the_clock_jumps() {
    let node = &Node::shared();
    let Some(library) = library() else { return skip("no libfaketime here: apt-get install libfaketime") };
    let queues = Queues::of("clock");
    let disk = tempfile::tempdir().unwrap();
    let file = disk.path().join("shift");
    shift(&file, 0);
    let surroundings = Surroundings {
        environment: vec![
            ("LD_PRELOAD", library.display().to_string()),
            ("FAKETIME_TIMESTAMP_FILE", file.display().to_string()),
            ("FAKETIME_NO_CACHE", "1".into()),
            ("FAKETIME_DONT_FAKE_MONOTONIC", "1".into()),
            ("FAKETIME_DISABLE_SHM", "1".into()),
        ],
        ..Surroundings::default()
    };
    let settings =
        queues.settings(&["worker.slots=4", "amqp.heartbeat_ms=5000", "amqp.operation_timeout_ms=30000"]);
    let mut worker = Worker::ready_in(node.url(), &settings, &surroundings).await;
    let requester = Requester::connect(node.url()).await;
    let mut replies = requester.replies(&queues.replies).await;
    let running = "sandpiper_jobs_running";

    for (round, to) in [DAY, -DAY, 0].into_iter().enumerate() {
        // One that ends by itself, one that has to be ended in time, one that is to be cold.
        for (kind, code, more) in [
            (
                "sleeps",
                "import time, os; time.sleep(2); print(int(time.time()), dict(os.environ))",
                json!({}),
            ),
            ("spins", "while True: pass", json!({"timeout_ms": 2_500})),
            (
                "fresh",
                "import time; time.sleep(2); print(int(time.time()), '')",
                json!({"limits": {"open_files": 64}}),
            ),
        ] {
            let mut job = json!({"id": format!("{kind}-{round}"), "code": code, "timeout_ms": 60_000});
            job.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
            let properties = BasicProperties::default().with_reply_to(queues.replies.as_str().into());
            requester.publish(&queues.jobs, job.to_string().as_bytes(), properties).await;
        }
        eventually("they run", async || (worker.metric(running) >= 1.0).then_some(())).await;
        shift(&file, to);
        for _ in 0..3 {
            let (_, result) = next(&mut replies).await;
            let now = jiff::Timestamp::now().as_second();
            if result["id"].as_str().unwrap().starts_with("spins") {
                assert_eq!(result["status"], "timeout", "{result}");
            } else {
                assert_eq!(result["status"], "succeeded", "{result}");
                let (clock, environment) = result["stdout"].as_str().unwrap().split_once(' ').unwrap();
                let clock: i64 = clock.parse().unwrap();
                assert!((clock - now).abs() < 600, "a job's clock is the machine's own, and says {clock}");
                assert!(!environment.contains("FAKETIME") && !environment.contains("LD_"), "{environment}");
            }
            let wall = result["usage"]["wall_ms"].as_f64().unwrap();
            assert!((1_900.0..HOUR * 1e3).contains(&wall), "{result}");
            for field in ["start_ms", "run_ms"] {
                assert!((0.0..HOUR * 1e3).contains(&result["timing"][field].as_f64().unwrap()), "{result}");
            }
            // It says honestly what its clock says.
            let finished = stamp(&result, "finished_at") - now;
            assert!((finished - to).abs() < 600, "the jump did not reach the worker: {result}");
        }
    }
    // No timer took part: neither a heartbeat nor a timeout of the broker's.
    worker.assert_alive();
    assert!(worker.get("/readyz").0);
    for role in ["consume", "publish"] {
        assert_eq!(worker.metric(&format!("sandpiper_connection_reconnects_total{{role=\"{role}\"}}")), 0.0);
    }
    for histogram in ["job_run", "job_start", "job_total", "publish_confirm"] {
        let sum = worker.total(&format!("sandpiper_{histogram}_seconds_sum"));
        assert!((0.0..HOUR).contains(&sum), "{histogram}: {sum}");
    }

    // A deadline is a moment of the day, and the worker's clock says whether it has passed.
    shift(&file, DAY);
    tokio::time::sleep(Duration::from_millis(10)).await;
    let in_an_hour = jiff::Timestamp::from_second(jiff::Timestamp::now().as_second() + 3_600).unwrap();
    let job = json!({"id": "deadline", "code": "print(1)", "deadline": in_an_hour.to_string()}).to_string();
    for status in ["expired", "succeeded"] {
        let properties = BasicProperties::default().with_reply_to(queues.replies.as_str().into());
        requester.publish(&queues.jobs, job.as_bytes(), properties).await;
        assert_eq!(next(&mut replies).await.1["status"], status);
        shift(&file, -DAY);
    }
    worker.terminate();
    assert_eq!(worker.ended().await.code(), Some(0), "{}", worker.log());
}
