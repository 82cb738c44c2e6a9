"""What the dashboards show: a line or two a panel. `generate` writes them down as Grafana wants them.

Ids of panels are kept: alerts and bookmarks link to them. Every rate is taken over `$__rate_interval`, every query
can be narrowed to a job, an instance and a queue, and what RabbitMQ counts is told apart by its queue.
"""

# What a worker says, what it says of a queue, and what RabbitMQ says of one.
W = '{job=~"$job",instance=~"$instance"}'
WQ = '{job=~"$job",instance=~"$instance",queue=~"$queue"}'
WE = '{job=~"$job",instance=~"$instance",environment=~"$environment"}'
Q = '{queue=~"$queue"}'
DEAD = '{queue=~"$dead_queue"}'
NODE = '{job=~"$rabbitmq",instance=~"$node"}'

VARIABLES = {
    "job": ("query", "Job", "label_values(sandpiper_build_info, job)", "The scrape job of the workers"),
    "instance": ("query", "Worker", 'label_values(sandpiper_build_info{job=~"$job"}, instance)', "Single workers"),
    "queue": ("query", "Queue", 'label_values(sandpiper_jobs_received_total{job=~"$job"}, queue)',
              "The queues that jobs come from"),
    "environment": ("query", "Environment",
                    'label_values(sandpiper_job_run_seconds_count{job=~"$job"}, environment)',
                    "The interpreters that jobs ask for by name"),
    "rabbitmq": ("query", "RabbitMQ", "label_values(rabbitmq_identity_info, job)", "The scrape job of the nodes"),
    "node": ("query", "Node", 'label_values(rabbitmq_identity_info{job=~"$rabbitmq"}, instance)', "Single nodes"),
    "dead_queue": ("text", "Dead queue", "sandpiper.dead", "amqp.dead_queue of the workers' configuration"),
    "results_queue": ("text", "Results queue", "sandpiper.results", "amqp.results_queue of the workers' configuration"),
    "target": ("text", "Jobs a worker", "20", "How many waiting jobs are to bring one worker more, as the autoscaler has it"),
}

# Of all dashboards about workers.
COMMON = ("job", "instance", "queue")

GREEN, RED, YELLOW, BLUE, ORANGE, PURPLE, GREY = "green", "red", "yellow", "blue", "orange", "purple", "#8e8e8e"
# The same colour for the same thing on every dashboard.
STATUS = {"succeeded": GREEN, "failed": BLUE, "signaled": "light-blue", "timeout": YELLOW, "cpu_limit": ORANGE,
          "memory_limit": "dark-orange", "output_limit": "light-orange", "syscall_killed": PURPLE,
          "rejected": "dark-blue", "cancelled": GREY, "expired": "dark-yellow", "worker_error": RED}


def rate(metric, selector, *by, window="$__rate_interval"):
    grouped = f" by ({', '.join(by)}) " if by else ""
    return f"sum{grouped}(rate({metric}{selector}[{window}]))"


def quantile(q, metric, selector, *by):
    return f"histogram_quantile({q}, {rate(f'{metric}_bucket', selector, 'le', *by)})"


def quantiles(metric, selector):
    return {name: quantile(q, metric, selector) for name, q in (("p50", 0.5), ("p95", 0.95), ("p99", 0.99))}


def panel(id, kind, title, description, unit, queries, width, height, thresholds=(), colors=None, stacked=False,
          zero=False, decimals=None, more=None):
    return {"id": id, "kind": kind, "title": title, "description": description, "unit": unit,
            "queries": queries if isinstance(queries, dict) else {title: queries}, "width": width, "height": height,
            "thresholds": list(thresholds), "colors": colors or {}, "stacked": stacked, "zero": zero,
            "decimals": decimals, "more": more}


def stat(id, title, description, unit, query, thresholds, more=None, decimals=None, width=3, height=4):
    return panel(id, "stat", title, description, unit, query, width, height, thresholds, more=more, decimals=decimals)


def lines(id, title, description, unit, queries, width=8, **rest):
    return panel(id, "timeseries", title, description, unit, queries, width, 8, **rest)


def table(id, title, description, unit, query, width=12, **rest):
    return panel(id, "table", title, description, unit, query, width, 8, **rest)


def steps(*pairs):
    """`steps(GREEN, (5, RED))`: green, and red from 5 on."""
    first, *rest = pairs
    return [(None, first), *rest]


def bad_from(value):
    return steps(GREEN, (value, RED))

COMPLETED = rate("sandpiper_jobs_completed_total", W)
OUR_FAULT = 'sum(rate(sandpiper_jobs_completed_total{job=~"$job",instance=~"$instance",status="worker_error"}[$__rate_interval]))'
SUCCEEDED = 'sum(rate(sandpiper_jobs_completed_total{job=~"$job",instance=~"$instance",status="succeeded"}[$__rate_interval]))'
WAITING = f"sum(max by (vhost, queue) (rabbitmq_detailed_queue_messages_ready{Q}))"

OVERVIEW = {
    "uid": "sandpiper-overview", "title": "Sandpiper / Overview", "variables": [*COMMON, "dead_queue"],
    "description": "For the person on call: are jobs taken, answered in time, and is nothing lost?",
    "rows": [
        ("Now", [
            stat(1, "Ready workers", "Workers that take jobs: connected, not blocked, not draining. If there is none,"
                 " jobs only queue up.", "short", f"sum(sandpiper_ready{W})",
                 steps(RED, (1, GREEN)), more="sandpiper-link"),
            stat(2, "Success ratio", "Jobs whose program ended with exit code 0, among all that came to an end. Failing"
                 " programs lower it; a sudden fall may still be a fault of the service.", "percentunit",
                 f"{SUCCEEDED} / {COMPLETED}", steps(RED, (0.5, YELLOW), (0.9, GREEN)),
                 more="sandpiper-jobs", decimals=1),
            stat(3, "Without worker errors", "Jobs that did not end as worker_error: the service level. Failures of the"
                 " programs themselves do not count.", "percentunit", f"1 - {OUR_FAULT} / {COMPLETED}",
                 steps(RED, (0.99, YELLOW), (0.999, GREEN)), more="sandpiper-jobs", decimals=2),
            stat(4, "Jobs/s", "Jobs that ended, whatever their status.", "short", COMPLETED,
                 steps(BLUE), more="sandpiper-jobs", decimals=1),
            stat(5, "Busy slots", "Jobs that run, of those that may run at one time. All busy and jobs waiting: more"
                 " workers are needed.", "percentunit", f"sum(sandpiper_jobs_running{W}) / sum(sandpiper_slots{W})",
                 steps(GREEN, (0.8, YELLOW), (0.95, RED)), more="sandpiper-autoscaling", decimals=0),
            stat(6, "Jobs waiting", "Ready in the queues, by RabbitMQ's count.", "short", WAITING,
                 steps(GREEN, (100, YELLOW), (1000, RED)), more="sandpiper-rabbitmq"),
            stat(7, "Oldest running job", "Of all workers. No job may run longer than limits.timeout_ms allows;"
                 " beyond its maximum a job is stuck.", "s", f"max(sandpiper_oldest_running_job_seconds{W})",
                 steps(GREEN, (300, YELLOW), (420, RED)), more="sandpiper-jobs", decimals=1),
            stat(8, "Dead-letter queue", "Messages that could not be handled and wait for an operator: `sandpiper dead list`.",
                 "short", f"sum(max by (vhost, queue) (rabbitmq_detailed_queue_messages{DEAD}))", bad_from(1),
                 more="sandpiper-rabbitmq"),
        ]),
        ("Over time", [
            lines(9, "Jobs/s by status", "How jobs ended. Red is a fault of the service; the other colours are the"
                  " programs' own results.", "short", {"{{status}}": rate("sandpiper_jobs_completed_total", W, "status")},
                  colors=STATUS, stacked=True, width=12, more="sandpiper-jobs"),
            lines(10, "From delivery to settlement", "From the delivery of a job to its settlement, its run included.",
                  "s", quantiles("sandpiper_job_total_seconds", W), width=12, more="sandpiper-jobs"),
            lines(11, "Ready and unacknowledged", "In the queues, by RabbitMQ's count: ready to be delivered, and"
                  " delivered but not yet acknowledged.", "short", {
                      "ready": WAITING,
                      "unacknowledged": f"sum(max by (vhost, queue) (rabbitmq_detailed_queue_messages_unacked{Q}))",
                  }, colors={"ready": ORANGE, "unacknowledged": BLUE}, more="sandpiper-rabbitmq"),
            lines(12, "Waiting time in the queue", "From publishing a job, by its timestamp, to its delivery. Jobs"
                  " without a timestamp do not count.", "s", quantiles("sandpiper_job_queue_wait_seconds", W),
                  thresholds=bad_from(60), more="sandpiper-autoscaling"),
            lines(13, "Slots", "Jobs that run, and how many may.", "short", {
                "running": f"sum(sandpiper_jobs_running{W})", "slots": f"sum(sandpiper_slots{W})",
            }, colors={"running": BLUE, "slots": GREY}, more="sandpiper-autoscaling"),
            lines(14, "Worker faults/s", "Jobs answered with worker_error, processes that could not be started,"
                  " acks lost with their channel.", "short", {
                      "worker_error": OUR_FAULT,
                      "not started": rate("sandpiper_job_start_failures_total", W),
                      "acks lost": 'sum(rate(sandpiper_deliveries_settled_total{job=~"$job",instance=~"$instance",'
                                   'action="lost"}[$__rate_interval]))',
                  }, colors={"worker_error": RED, "not started": ORANGE, "acks lost": PURPLE}, more="sandpiper-link"),
            lines(15, "Workers", "Scraped by Prometheus, ready, and draining.", "short", {
                "up": f"count(sandpiper_ready{W})", "ready": f"sum(sandpiper_ready{W})",
                "draining": f"sum(sandpiper_draining{W})",
            }, colors={"up": GREY, "ready": GREEN, "draining": YELLOW}, more="sandpiper-link"),
            lines(16, "Dead-lettered/s", "Malformed: not a job at all. Too large: above amqp.max_body_bytes. Poison: delivered"
                  " again and again without a result.", "short",
                  {"{{reason}}": rate("sandpiper_jobs_dead_lettered_total", W, "reason")},
                  colors={"malformed": YELLOW, "too_large": ORANGE, "poison": RED}, more="sandpiper-rabbitmq"),
        ]),
    ],
}

JOBS = {
    "uid": "sandpiper-jobs", "title": "Sandpiper / Jobs", "variables": [*COMMON, "environment"],
    "description": "Rate, errors and duration of jobs, by status and by environment.",
    "rows": [
        ("Rate", [
            lines(1, "Jobs/s by status", "Every job, also those that never ran.", "short",
                  {"{{status}}": rate("sandpiper_jobs_completed_total", W, "status")}, colors=STATUS, stacked=True),
            lines(2, "Runs/s by environment", "Jobs whose code was handed over to a process.", "short",
                  {"{{environment}}": rate("sandpiper_job_run_seconds_count", WE, "environment")}, stacked=True),
            lines(3, "Deliveries/s by queue", "Redelivered messages included.", "short",
                  {"{{queue}}": rate("sandpiper_jobs_received_total", WQ, "queue")}),
        ]),
        ("Errors", [
            lines(4, "Failures of programs, share by status", "Among all jobs that ended.",
                  "percentunit", {"{{status}}":
                      'sum by (status) (rate(sandpiper_jobs_completed_total{job=~"$job",instance=~"$instance",'
                      'status!~"succeeded|worker_error"}[$__rate_interval])) / ignoring(status) group_left '
                      + COMPLETED}, colors=STATUS, stacked=True),
            lines(5, "Worker errors, share", "worker_error among all jobs that ended. The alert on it is a burn rate of an"
                  " error budget of one in a thousand.", "percentunit", {"worker_error": f"{OUR_FAULT} / {COMPLETED}"},
                  colors={"worker_error": RED}, thresholds=bad_from(0.001)),
            table(6, "Jobs by environment and status", "How many ended in the time range shown.", "short",
                  {"": f"sum by (environment, status) (increase(sandpiper_job_run_seconds_count{WE}[$__range])) > 0"},
                  width=8, decimals=0),
        ]),
        ("Duration", [
            lines(7, "Run time, p95 by environment", "From the hand-over of the code until every process of the job is dead.",
                  "s", {"{{environment}}": quantile(0.95, "sandpiper_job_run_seconds", WE, "environment")}),
            lines(8, "Run time, p95 by status", "Timeouts stand at their time limit.", "s",
                  {"{{status}}": quantile(0.95, "sandpiper_job_run_seconds", WE, "status")}, colors=STATUS),
            lines(9, "Run time", "Of all jobs that ran.", "s", quantiles("sandpiper_job_run_seconds", WE)),
            lines(10, "From delivery to settlement", "With the wait for a slot, the start, the run and the confirm.", "s",
                  quantiles("sandpiper_job_total_seconds", W)),
            lines(11, "Waiting time in the queue", "By the timestamp that the publisher wrote.", "s",
                  quantiles("sandpiper_job_queue_wait_seconds", W), thresholds=bad_from(60)),
            lines(12, "Oldest", "The job that has run longest, and the delivery that has been held longest.", "s", {
                "running job": f"max(sandpiper_oldest_running_job_seconds{W})",
                "delivery": f"max(sandpiper_oldest_delivery_seconds{W})",
            }, thresholds=steps(GREEN, (420, RED))),
            lines(13, "Message bodies, p95", "Jobs as received, results as published.", "bytes",
                  {"{{body}}": quantile(0.95, "sandpiper_message_body_bytes", W, "body")}),
            lines(14, "Peak memory of jobs", "Of all processes of a job together, where the kernel tells.", "bytes",
                  quantiles("sandpiper_job_memory_peak_bytes", W)),
            lines(15, "Stuck workers", "Workers that make no progress; /healthz fails and says why, and the"
                  " supervisor should restart them.", "short", {"{{instance}}": f"sandpiper_stuck{W}"},
                  thresholds=bad_from(1)),
        ]),
    ],
}

SANDBOX = {
    "uid": "sandpiper-sandbox", "title": "Sandpiper / Sandbox", "variables": [*COMMON, "environment"],
    "description": "What the sandbox kills and refuses, and how fast and how reliably it starts.",
    "rows": [
        ("Kills and refusals", [
            lines(1, "Limits reached/s", "Jobs ended for their wall time, CPU time, memory or output.", "short",
                  {"{{status}}": 'sum by (status) (rate(sandpiper_jobs_completed_total{job=~"$job",'
                                 'instance=~"$instance",status=~"timeout|.*_limit"}[$__rate_interval]))'},
                  colors=STATUS, stacked=True),
            lines(2, "Killed for a system call, by name", "A surge is an attack, or a library that the policy does not"
                  " know: `sandpiper policy` shows what is forbidden and why.", "short",
                  {"{{syscall}}": f"topk(10, {rate('sandpiper_syscall_kills_total', W, 'syscall')} > 0)"}),
            lines(3, "Refused system calls, by name", "Answered with an errno; the program goes on.", "short",
                  {"{{syscall}}": f"topk(10, {rate('sandpiper_syscalls_refused_total', W, 'syscall')} > 0)"}),
            stat(4, "Timeouts", "In the time range shown.", "short",
                 f"sum(increase(sandpiper_job_timeouts_total{W}[$__range]))", steps(BLUE), decimals=0, width=4, height=8),
            stat(5, "Killed for a system call", "In the time range shown.", "short",
                 f"sum(increase(sandpiper_syscall_kills_total{W}[$__range]))", steps(PURPLE), decimals=0, width=4, height=8),
            table(6, "Jobs killed, by call", "In the time range shown, by the name in the kernel's table.", "short",
                  {"": f"topk(20, sum by (syscall) (increase(sandpiper_syscall_kills_total{W}[$__range])) > 0)"},
                  width=8, decimals=0),
            table(15, "Calls refused", "In the time range shown, by the name in the kernel's table.", "short",
                  {"": f"topk(20, sum by (syscall) (increase(sandpiper_syscalls_refused_total{W}[$__range])) > 0)"},
                  width=8, decimals=0),
        ]),
        ("Starts", [
            lines(7, "Start time, warm", "From accepting a job to handing over its code, for forks of a zygote.",
                  "s", quantiles("sandpiper_job_start_seconds", W[:-1] + ',start="warm"}')),
            lines(8, "Start time, cold", "The same for a new python.", "s",
                  quantiles("sandpiper_job_start_seconds", W[:-1] + ',start="cold"}')),
            lines(9, "Starts/s", "Cold ones if the job needs it (network, preload) or no zygote is up.",
                  "short", {"{{start}}": rate("sandpiper_job_start_seconds_count", W, "start")},
                  colors={"warm": GREEN, "cold": BLUE}, stacked=True),
            lines(10, "Warm pool", "Forked interpreters that wait for a job, of all workers.", "short",
                  {"{{environment}}": f"sum by (environment) (sandpiper_standby_children{WE})"}),
            lines(11, "Zygotes up", "Workers whose zygote runs. Down: every job of the environment starts cold;"
                  " /readyz and the log say why.", "short",
                  {"{{environment}}": f"sum by (environment) (sandpiper_zygote_up{WE})"}),
            lines(12, "Zygote restarts and failures/s", "Restarts after some thousand forks are normal. Failures are"
                  " an import that fails, or a system that denies a layer.", "short", {
                      "restarted {{environment}}": rate("sandpiper_zygote_restarts_total", WE, "environment"),
                      "failed {{environment}}": rate("sandpiper_zygote_start_failures_total", WE, "environment"),
                  }),
            lines(13, "Failed starts/s", "Each is retried a few times, then answered as worker_error: run"
                  " `sandpiper doctor` on that machine.", "short",
                  {"{{environment}}": rate("sandpiper_job_start_failures_total", WE, "environment")},
                  thresholds=bad_from(0.01), width=12),
            lines(14, "Peak memory of jobs", "Of all processes of a job together, where the kernel tells.", "bytes",
                  quantiles("sandpiper_job_memory_peak_bytes", W), width=12),
        ]),
    ],
}

LINK = {
    "uid": "sandpiper-link", "title": "Sandpiper / Broker link", "variables": [*COMMON],
    "description": "The workers' side of the broker: connections, confirms and redeliveries.",
    "rows": [
        ("Connections", [
            lines(1, "Connections up", "Each worker has two: one takes jobs, one publishes results.", "short",
                  {"{{role}}": f"sum by (role) (sandpiper_connection_up{W})"}),
            lines(2, "Blocked by the broker", "The broker takes no messages: short of memory or disk.", "short",
                  {"{{role}}": f"sum by (role) (sandpiper_connection_blocked{W})"}, thresholds=bad_from(1)),
            lines(3, "Reconnects/s", "Attempts after the first; they never stop.", "short",
                  {"{{role}}": rate("sandpiper_connection_reconnects_total", W, "role")}),
        ]),
        ("Results", [
            lines(4, "Results/s by outcome", "Confirmed is the normal one. Returned: the queue is gone, and the result goes to"
                  " the results queue.", "short",
                  {"{{outcome}}": rate("sandpiper_results_published_total", W, "outcome")},
                  colors={"confirmed": GREEN, "returned": YELLOW, "nacked": ORANGE, "refused": ORANGE, "timed_out": RED,
                          "dropped": GREY, "failed": PURPLE}, stacked=True),
            lines(5, "Time to the confirm", "From publishing a result to the broker's confirm.", "s",
                  quantiles("sandpiper_publish_confirm_seconds", W)),
            lines(6, "Returned and redirected/s", "Results whose reply queue was gone, or did not take them.", "short", {
                "returned": 'sum(rate(sandpiper_results_published_total{job=~"$job",instance=~"$instance",'
                            'outcome="returned"}[$__rate_interval]))',
                "to the results queue": rate("sandpiper_results_redirected_total", W),
            }),
        ]),
        ("Deliveries", [
            lines(7, "Settlements/s", "How deliveries were settled, by action.", "short",
                  {"{{action}}": rate("sandpiper_deliveries_settled_total", W, "action")},
                  colors={"acked": GREEN, "requeued": YELLOW, "dead_lettered": ORANGE, "counted": BLUE,
                          "lost": RED}, stacked=True),
            lines(8, "Redeliveries/s", "A few after a restart are normal; many are jobs that end their workers, or a broker"
                  " that loses channels.", "short",
                  {"{{queue}}": rate("sandpiper_jobs_redelivered_total", WQ, "queue")}),
            lines(9, "Lost acks/s", "Their channel was closed: these jobs are redelivered.", "short",
                  {"lost": 'sum(rate(sandpiper_deliveries_settled_total{job=~"$job",instance=~"$instance",'
                           'action="lost"}[$__rate_interval]))'}, colors={"lost": RED}),
            lines(10, "Oldest delivery held", "The broker takes back one that is held for longer than its consumer"
                  " timeout, 30 minutes by default.", "s",
                  {"{{instance}}": f"sandpiper_oldest_delivery_seconds{W}",
                   "{{instance}}, result not confirmed": f"sandpiper_oldest_publish_seconds{W}"},
                  thresholds=steps(GREEN, (1200, YELLOW), (1800, RED)), width=12),
            lines(11, "Message bodies, bytes/s", "Jobs received, and results published.", "Bps",
                  {"{{body}}": rate("sandpiper_message_body_bytes_sum", W, "body")}, width=12),
        ]),
    ],
}

RABBITMQ = {
    "uid": "sandpiper-rabbitmq", "title": "Sandpiper / RabbitMQ",
    "variables": ["job", "queue", "rabbitmq", "node", "dead_queue", "results_queue"],
    "description": "The queues and the nodes, by RabbitMQ's own metrics.",
    "rows": [
        ("Queues", [
            lines(1, "Ready", "Jobs that wait for a worker.", "short",
                  {"{{queue}}": f"max by (vhost, queue) (rabbitmq_detailed_queue_messages_ready{Q})"}),
            lines(2, "Unacknowledged", "Jobs that a worker holds: at most slots and prefetch_surplus of each.", "short",
                  {"{{queue}}": f"max by (vhost, queue) (rabbitmq_detailed_queue_messages_unacked{Q})"}),
            lines(3, "Consumers", "One for each worker and queue. None: nobody takes these jobs.", "short",
                  {"{{queue}}": f"max by (vhost, queue) (rabbitmq_detailed_queue_consumers{Q})"}),
            lines(4, "Dead-letter queue", "Wait for an operator: `sandpiper dead list`.", "short",
                  {"{{queue}}": f"max by (vhost, queue) (rabbitmq_detailed_queue_messages{DEAD})"},
                  thresholds=bad_from(1)),
            lines(5, "Results queue", "Results without a reply queue, until somebody reads them.", "short", {
                "{{queue}}": 'max by (vhost, queue) (rabbitmq_detailed_queue_messages{queue=~"$results_queue"})'}),
            lines(6, "Consumer capacity", "The share of time in which the queue could deliver at once. Below 1 with"
                  " jobs waiting: the workers are busy.", "percentunit",
                  {"{{queue}}": f"max by (vhost, queue) (rabbitmq_detailed_queue_consumer_capacity{Q})"}),
            lines(7, "Bytes in the queues", "Bodies of all messages.", "bytes",
                  {"{{queue}}": f"max by (vhost, queue) (rabbitmq_detailed_queue_messages_bytes{Q})"}, width=12),
            lines(8, "Memory of the queues", "Of their processes in the node.", "bytes",
                  {"{{queue}}": f"max by (vhost, queue) (rabbitmq_detailed_queue_process_memory_bytes{Q})"}, width=12),
        ]),
        ("Nodes", [
            lines(9, "Messages/s", "Over all queues of the nodes, not only those of the workers.", "short", {
                "received": rate("rabbitmq_global_messages_received_total", NODE),
                "confirmed": rate("rabbitmq_global_messages_confirmed_total", NODE),
                "delivered": rate("rabbitmq_global_messages_delivered_total", NODE),
                "acknowledged": rate("rabbitmq_global_messages_acknowledged_total", NODE),
            }),
            lines(10, "Redelivered and unroutable/s", "As the nodes count them.", "short", {
                "redelivered": rate("rabbitmq_global_messages_redelivered_total", NODE),
                "returned": rate("rabbitmq_global_messages_unroutable_returned_total", NODE),
                "dropped": rate("rabbitmq_global_messages_unroutable_dropped_total", NODE),
            }),
            lines(11, "Alarms", "1 while a node blocks publishers: memory, disk, descriptors.", "short", {
                "memory": f"max(rabbitmq_alarms_memory_used_watermark{NODE})",
                "disk": f"max(rabbitmq_alarms_free_disk_space_watermark{NODE})",
                "descriptors": f"max(rabbitmq_alarms_file_descriptor_limit{NODE})",
            }, thresholds=bad_from(1)),
            lines(12, "Memory before the alarm", "Used, of what sets it off.", "percentunit", {
                "{{instance}}": f"rabbitmq_process_resident_memory_bytes{NODE} / rabbitmq_resident_memory_limit_bytes{NODE}"},
                thresholds=bad_from(0.9)),
            lines(13, "Free disk above the alarm", "Beyond the limit that sets it off.", "bytes", {
                "{{instance}}": f"rabbitmq_disk_space_available_bytes{NODE} - "
                                f"rabbitmq_disk_space_available_limit_bytes{NODE}"}),
            lines(14, "Connections and channels", "Of all clients.", "short", {
                "connections": f"sum(rabbitmq_connections{NODE})", "channels": f"sum(rabbitmq_channels{NODE})"}),
        ]),
    ],
}

ARRIVING = ('sum(rate(sandpiper_jobs_received_total{job=~"$job",instance=~"$instance",queue=~"$queue"}'
            f"[$__rate_interval])) + sum(max by (vhost, queue) (deriv(rabbitmq_detailed_queue_messages_ready{Q}"
            "[$__rate_interval])))")
AUTOSCALING = {
    "uid": "sandpiper-autoscaling", "title": "Sandpiper / Autoscaling", "variables": [*COMMON, "target"],
    "description": "Are there enough workers, and do they have enough resources?",
    "rows": [
        ("Demand", [
            lines(1, "Workers", "Ready ones, and how many the queues ask for: one for each $target jobs that wait"
                  " or run, as the autoscaler counts.", "short", {
                      "ready": f"sum(sandpiper_ready{W})",
                      "wanted": f"ceil(sum(max by (vhost, queue) (rabbitmq_detailed_queue_messages{Q})) / $target)",
                      "draining": f"sum(sandpiper_draining{W})",
                  }, colors={"ready": GREEN, "wanted": ORANGE, "draining": YELLOW}),
            lines(2, "Busy slots", "Always near 1: more workers. Always near 0: fewer.", "percentunit", {
                "busy": f"sum(sandpiper_jobs_running{W}) / sum(sandpiper_slots{W})",
                "{{instance}}": f"sandpiper_jobs_running{W} / sandpiper_slots{W}"},
                thresholds=bad_from(0.95)),
            lines(3, "Slots needed", "Jobs/s times the seconds that one holds its slot: so many are busy on average"
                  " (Little's law). The number of slots should stay above.", "short", {
                      "needed": f"{rate('sandpiper_job_run_seconds_sum', W)} + {rate('sandpiper_job_start_seconds_sum', W)}",
                      "slots": f"sum(sandpiper_slots{W})",
                  }, colors={"needed": ORANGE, "slots": GREY}),
            lines(4, "Arriving and ended, jobs/s", "Arriving: deliveries, and what the queues grow by.", "short",
                  {"arriving": ARRIVING, "ended": COMPLETED}, colors={"arriving": ORANGE, "ended": GREEN}),
            lines(5, "Backlog in seconds", "Jobs that wait, divided by the present throughput.", "s",
                  {"backlog": f"{WAITING} / {COMPLETED}"},
                  thresholds=steps(GREEN, (60, YELLOW), (300, RED))),
            lines(6, "Jobs waiting for each worker", "What the autoscaler compares with its target.", "short", {
                "waiting": f"{WAITING} / sum(sandpiper_ready{W})", "target": "vector($target)"},
                colors={"waiting": ORANGE, "target": GREY}),
        ]),
        ("What each worker uses", [
            lines(7, "CPU of the worker itself", "In cores, without its jobs' processes.", "short",
                  {"{{instance}}": f"rate(process_cpu_seconds_total{W}[$__rate_interval])"}),
            lines(8, "Memory of the worker itself", "Resident, without its jobs' processes.", "bytes",
                  {"{{instance}}": f"process_resident_memory_bytes{W}"}),
            lines(9, "Open descriptors", "Of its limit.", "percentunit",
                  {"{{instance}}": f"process_open_fds{W} / process_max_fds{W}"}, thresholds=bad_from(0.9)),
            lines(10, "Jobs/s by worker", "Equal workers have about equal rates.", "short",
                  {"{{instance}}": rate("sandpiper_jobs_completed_total", W, "instance")}, stacked=True, width=12),
            lines(11, "Requeued/s", "By workers that drain, or could not start a job.", "short", {
                "{{instance}}": 'sum by (instance) (rate(sandpiper_deliveries_settled_total{job=~"$job",'
                                'instance=~"$instance",action="requeued"}[$__rate_interval]))'}, width=12),
        ]),
    ],
}

DASHBOARDS = [OVERVIEW, JOBS, SANDBOX, LINK, RABBITMQ, AUTOSCALING]
BY_UID = {dashboard["uid"]: dashboard for dashboard in DASHBOARDS}
