//! How fast the server is, as a multiple of what the kernel asks for the same work.
//!
//!     make bench
//!
//! The *floor* is a bare loop in a process of its own that writes the same bytes to as many
//! loopback sockets. Server and floor are measured in the same run, on the same processor, by the
//! processor time that the kernel counts for them; the load runs on another one. Every delivery is
//! counted by its bytes; a wrong count makes the run fail. No time does.

#[path = "../suite/process.rs"]
mod process;

use process::{descriptor_limit, processor_time, Server};
use std::fmt::Display;
use std::io::{self, BufRead, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::{Child, Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

const SENDERS: usize = 10;
const PAIRS: usize = 20;
const TEXT: usize = 64;

/// Which processors server and load are put on, if there are two.
const SERVER_ON: &str = "1";
const LOAD_ON: &str = "0";

fn micros(time: Duration, per: usize) -> f64 {
    time.as_secs_f64() * 1e6 / per.max(1) as f64
}

/// One row of the table.
fn row(what: impl Display, ratio: impl Display, figures: impl Display) {
    println!("| {what} | {ratio} | {figures} |");
}

/// Processor and wall time of one stretch, of the measured process and of the load.
struct Spent {
    server: Duration,
    load: Duration,
    wall: Duration,
}

impl Spent {
    fn during(process: u32, work: impl FnOnce()) -> Spent {
        let own = std::process::id();
        let before = (processor_time(process), processor_time(own), Instant::now());
        work();
        Spent {
            server: processor_time(process) - before.0,
            load: processor_time(own) - before.1,
            wall: before.2.elapsed(),
        }
    }

    /// How busy the load was, and whether that is what limited the row.
    fn load_share(&self) -> String {
        let share = self.load.as_secs_f64() / self.wall.as_secs_f64();
        let mark = if self.load > self.server { " (limits)" } else { "" };
        format!("load {:.0} %{mark}", share * 100.0)
    }
}

/// Connects a socket of the load, which asks again and again rather than sleep: waking up takes
/// longer on a virtual machine than what is measured.
fn connect(address: &str) -> TcpStream {
    let socket = TcpStream::connect(address).expect("connects");
    socket.set_nodelay(true).expect("no delay");
    socket.set_nonblocking(true).expect("does not block");
    socket
}

/// Reads what there is, as soon as there is something.
fn read(socket: &mut TcpStream, buffer: &mut [u8]) -> usize {
    loop {
        match socket.read(buffer) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => std::thread::yield_now(),
            result => return result.expect("reads"),
        }
    }
}

/// Reads just so many bytes, which must end a line.
fn take(socket: &mut TcpStream, count: usize, buffer: &mut Vec<u8>) {
    buffer.resize(count.max(buffer.len()), 0);
    let mut taken = 0;
    while taken < count {
        let length = read(socket, &mut buffer[taken..count]);
        assert!(length > 0, "the server ended a connection");
        taken += length;
    }
    assert!(count == 0 || buffer[count - 1] == b'\n', "deliveries of another length");
}

/// People in a room, whose sockets hold nothing unread between two steps.
struct Crowd {
    server: Server,
    people: Vec<TcpStream>,
    buffer: Vec<u8>,
}

fn name(at: usize) -> String {
    format!("p{at:05}")
}

impl Crowd {
    fn gather(count: usize) -> Crowd {
        let mut command = Command::new("taskset");
        command.args(["-c", SERVER_ON, env!("CARGO_BIN_EXE_linechat-server")]);
        let server = if can_pin() { Server::start_as(&mut command) } else { Server::start(&[]) };
        let server = server.expect("the server starts");
        let mut crowd = Crowd { server, people: Vec::new(), buffer: Vec::new() };
        crowd.join(count);
        crowd.fence();
        crowd
    }

    fn join(&mut self, count: usize) {
        for at in self.people.len()..count {
            let mut socket = connect(&self.server.address);
            socket.write_all(format!("NAME {}\n", name(at)).as_bytes()).expect("takes a name");
            self.people.push(socket);
        }
    }

    /// Everybody reads all that they were sent. Returns how many bytes that was.
    fn fence(&mut self) -> usize {
        let mut bytes = 0;
        // By the second round everything has been dealt with, so nothing comes after its PONG.
        for (ping, pong) in [("PING 1\n", "PONG 1\r\n"), ("PING 2\n", "PONG 2\r\n")] {
            for socket in &mut self.people {
                socket.write_all(ping.as_bytes()).expect("takes a line");
                let mut end: Vec<u8> = Vec::new();
                while !end.windows(pong.len()).any(|window| window == pong.as_bytes()) {
                    self.buffer.resize(1 << 16, 0);
                    let length = read(socket, &mut self.buffer);
                    assert!(length > 0, "the server ended a connection");
                    bytes += length;
                    end.drain(..end.len().saturating_sub(pong.len()));
                    end.extend(&self.buffer[..length]);
                }
            }
        }
        bytes - 2 * "PONG 1\r\n".len() * self.people.len()
    }

    /// What a message of the benchmark is to those who receive it.
    fn line(at: usize) -> String {
        format!("MSG {} {}\r\n", name(at), "x".repeat(TEXT))
    }

    fn say(&mut self, at: usize, messages: usize) {
        let line = format!("MSG {}\n", "x".repeat(TEXT));
        self.people[at].write_all(line.repeat(messages).as_bytes()).expect("takes messages");
    }

    /// Everybody receives `messages` from each of the first `senders`, but not their own.
    fn hear(&mut self, senders: &[usize], messages: usize) {
        let length = Crowd::line(0).len() * messages;
        for (at, socket) in self.people.iter_mut().enumerate() {
            let others = senders.len() - usize::from(senders.contains(&at));
            take(socket, length * others, &mut self.buffer);
        }
    }

    /// One sender after the other, each with one message, all of it delivered before the next.
    fn fan_out_singly(&mut self, rounds: usize) -> Spent {
        Spent::during(self.server.child.id(), || {
            for round in 0..rounds {
                let sender = round % SENDERS;
                self.say(sender, 1);
                self.hear(&[sender], 1);
            }
        })
    }

    /// All senders keep `messages` in flight: the next are sent while the last are received.
    fn fan_out(&mut self, rounds: usize, messages: usize) -> Spent {
        let senders: Vec<_> = (0..SENDERS).collect();
        Spent::during(self.server.child.id(), || {
            senders.iter().for_each(|&sender| self.say(sender, messages));
            for round in 1..=rounds {
                if round < rounds {
                    senders.iter().for_each(|&sender| self.say(sender, messages));
                }
                self.hear(&senders, messages);
            }
        })
    }
}

/// A private message as it is sent to whoever has this place; as it is received, and confirmed.
fn private(at: usize) -> String {
    format!("PRIV @{} {}\n", name(at), "x".repeat(TEXT))
}

fn private_received() -> String {
    format!("PRIV {} {}\r\n", name(0), "x".repeat(TEXT))
}

/// One of each pair writes to the other, who receives it while the one receives as much.
fn whisper(people: &mut [TcpStream], rounds: usize, buffer: &mut Vec<u8>) {
    for _ in 0..rounds {
        for pair in 0..PAIRS {
            let line = private(2 * pair + 1);
            people[2 * pair].write_all(line.as_bytes()).expect("takes a line");
        }
        for socket in &mut people[..2 * PAIRS] {
            take(socket, private_received().len(), buffer);
        }
    }
}

/// The bare loop: accepts so many connections and, when told, writes lines to each of them, or
/// reads a private message and writes both of its lines.
fn floor(count: usize) -> io::Result<()> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    println!("{}", listener.local_addr()?);
    let mut sockets = Vec::new();
    for _ in 0..count {
        let (socket, _) = listener.accept()?;
        socket.set_nodelay(true)?;
        sockets.push(socket);
    }
    for command in io::stdin().lock().lines() {
        let command = command?;
        if let Some(rounds) = command.strip_prefix("whisper ") {
            let mut request = vec![0; private(0).len()];
            let line = private_received();
            for at in 0..rounds.parse().unwrap_or(0) * PAIRS {
                let [one, other] = [2 * (at % PAIRS), 2 * (at % PAIRS) + 1];
                sockets[one].read_exact(&mut request)?;
                sockets[other].write_all(line.as_bytes())?;
                sockets[one].write_all(line.as_bytes())?;
            }
            continue;
        }
        let mut numbers = command.split(' ').filter_map(|word| word.parse::<usize>().ok());
        let (rounds, lines) = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
        let bytes = Crowd::line(0).repeat(lines);
        for _ in 0..rounds {
            for socket in &mut sockets {
                socket.write_all(bytes.as_bytes())?;
            }
        }
    }
    Ok(())
}

/// The load's side of the floor.
struct Floor {
    child: Child,
    sockets: Vec<TcpStream>,
    buffer: Vec<u8>,
}

impl Floor {
    fn start(count: usize) -> Floor {
        let this = std::env::current_exe().expect("this program");
        let mut command = match can_pin() {
            true => {
                let mut command = Command::new("taskset");
                command.args(["-c", SERVER_ON]).arg(this);
                command
            }
            false => Command::new(this),
        };
        command.args(["floor", &count.to_string()]);
        let mut child =
            command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("the floor starts");
        let mut address = String::new();
        let printed = child.stdout.take().expect("a pipe");
        io::BufReader::new(printed).read_line(&mut address).expect("an address");
        let sockets = (0..count).map(|_| connect(address.trim()));
        let sockets = sockets.collect();
        Floor { child, sockets, buffer: Vec::new() }
    }

    /// Writes `lines` at once to everybody, `rounds` times.
    fn write(&mut self, rounds: usize, lines: usize) -> Spent {
        Spent::during(self.child.id(), || {
            for _ in 0..rounds {
                let told = self.child.stdin.as_mut().expect("a pipe");
                writeln!(told, "1 {lines}").expect("takes a command");
                let length = Crowd::line(0).len() * lines;
                for socket in &mut self.sockets {
                    take(socket, length, &mut self.buffer);
                }
            }
        })
    }
}

impl Floor {
    /// Reads and writes what private messages take.
    fn whisper(&mut self, rounds: usize) -> Spent {
        Spent::during(self.child.id(), || {
            let told = self.child.stdin.as_mut().expect("a pipe");
            writeln!(told, "whisper {rounds}").expect("takes a command");
            whisper(&mut self.sockets, rounds, &mut self.buffer);
        })
    }
}

impl Drop for Floor {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn can_pin() -> bool {
    std::thread::available_parallelism().is_ok_and(|count| count.get() > 1)
        || std::env::var_os(PINNED).is_some()
}

/// Set for the copy of this program that runs on one processor.
const PINNED: &str = "LINECHAT_BENCH_PINNED";

/// Fan-out, and what it costs beside the floor. Returns the floor's time for one write.
fn fan_out(crowd: &mut Crowd) -> Duration {
    let people = crowd.people.len();
    // Both have their connections here, and all of them must be within the limit on open files.
    let mut floor = Floor::start(people.min(descriptor_limit().saturating_sub(people)));
    let below = floor.sockets.len();
    let singles = (60_000 / people).clamp(6, 200);
    let batches = (8000 / people).clamp(3, 60);
    // In turn, so that a change in the machine's speed meets all of them.
    let mut best: [Vec<f64>; 4] = Default::default();
    let mut last = None;
    let mut floor_write = Vec::new();
    for _ in 0..3 {
        let alone = floor.write(singles, 1);
        let single = crowd.fan_out_singly(singles);
        let batch = floor.write(batches, SENDERS * 64);
        let ten = crowd.fan_out(batches, 1);
        let many = crowd.fan_out(batches, 64);
        let write = micros(alone.server, singles * below);
        let deliveries = batches * (people - 1) * SENDERS;
        let delivery = micros(many.server, deliveries * 64);
        floor_write.push(alone.server / (singles * below) as u32);
        best[0].push(micros(single.server, singles * (people - 1)) / write);
        best[1].push(micros(ten.server, deliveries) / write);
        best[2].push(delivery / micros(batch.server, batches * below * SENDERS * 64));
        best[3].push(write / delivery);
        last = Some((single, ten, many, write));
    }
    let Some((single, ten, many, write)) = last else { return Duration::ZERO };
    let [one, each, batched, gain] = best.map(median);
    let figures = |spent: &Spent, deliveries: usize| {
        format!(
            "{:.3} µs a delivery, {:.2} million a second; {}",
            micros(spent.server, deliveries),
            deliveries as f64 / spent.wall.as_secs_f64() / 1e6,
            spent.load_share()
        )
    };
    let others = people - 1;
    row(
        format!("fan-out to {people}, one message in flight"),
        format!("{one:.2} × a floor write ({write:.2} µs)"),
        figures(&single, singles * others),
    );
    row(
        format!("fan-out to {people}, 10 senders with 1 in flight"),
        format!("{each:.2} × a floor write"),
        figures(&ten, batches * others * SENDERS),
    );
    row(
        format!("fan-out to {people}, 10 senders with 64 in flight"),
        format!("{batched:.2} × the floor's batches, {gain:.0} × a floor that writes each line"),
        format!(
            "{}; at most {:.1} MB of memory",
            figures(&many, batches * others * SENDERS * 64),
            crowd.server.peak_memory() as f64 / 1e6
        ),
    );
    floor_write.sort();
    floor_write[1]
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// Time from sending to what everybody, and the last, has received.
fn latency() {
    let people = 1000;
    let mut crowd = Crowd::gather(people);
    let mut floor = Floor::start(people);
    let mut buffer = Vec::new();
    let length = Crowd::line(0).len();
    let (mut each, mut last, mut floor_last) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..30 {
        let begun = Instant::now();
        let told = floor.child.stdin.as_mut().expect("a pipe");
        writeln!(told, "1 1").expect("takes a command");
        floor.sockets.iter_mut().for_each(|socket| take(socket, length, &mut buffer));
        floor_last.push(begun.elapsed().as_secs_f64());
        std::thread::sleep(Duration::from_millis(50)); // the pace is what is measured at
        let begun = Instant::now();
        crowd.say(0, 1);
        for socket in &mut crowd.people[1..] {
            take(socket, length, &mut buffer);
            each.push(begun.elapsed().as_secs_f64());
        }
        last.push(begun.elapsed().as_secs_f64());
        std::thread::sleep(Duration::from_millis(50)); // the pace is what is measured at
    }
    each.sort_by(f64::total_cmp);
    let at = |share: f64| each[((each.len() - 1) as f64 * share) as usize] * 1e3;
    let (ours, floors) = (median(last), median(floor_last));
    row(
        "latency to 1000, 10 messages a second",
        format!("last receiver {:.2} × the floor", ours / floors),
        format!(
            "p50 {:.2} ms, p99 {:.2} ms, longest {:.2} ms; last receiver {:.2} ms",
            at(0.5),
            at(0.99),
            at(1.0),
            ours * 1e3
        ),
    );
}

/// Private messages between twenty pairs, each with one in flight.
fn whispers(crowd: &mut Crowd, floor_write: Duration, in_a_hundred: f64) -> f64 {
    let people = crowd.people.len();
    let mut floor = Floor::start(2 * PAIRS);
    let rounds = 100;
    let mut costs = Vec::new();
    let mut ratios = Vec::new();
    let mut last = None;
    for _ in 0..3 {
        let alone = floor.whisper(rounds);
        let spent = Spent::during(crowd.server.child.id(), || {
            whisper(&mut crowd.people, rounds, &mut crowd.buffer);
        });
        costs.push(micros(spent.server, PAIRS * rounds));
        ratios.push(spent.server.as_secs_f64() / alone.server.as_secs_f64());
        last = Some(spent);
    }
    let cost = median(costs);
    let Some(spent) = last else { return cost };
    let growth = match in_a_hundred > 0.0 {
        true => format!(", {:.2} × that in a room of 100", cost / in_a_hundred),
        false => String::new(),
    };
    row(
        format!("private message with confirmation, room of {people}"),
        format!(
            "{:.2} × a floor write, {:.2} × a floor that reads it and writes both lines{growth}",
            cost / micros(floor_write, 1),
            median(ratios)
        ),
        format!(
            "{cost:.2} µs; {:.0} a second; {}",
            (PAIRS * rounds) as f64 / spent.wall.as_secs_f64(),
            spent.load_share()
        ),
    );
    cost
}

/// One after the other joins and leaves.
fn joins(crowd: &mut Crowd, floor_write: Duration) {
    let people = crowd.people.len();
    let rounds = (10_000 / people).clamp(3, 20);
    let mut bytes = 0;
    let spent = Spent::during(crowd.server.child.id(), || {
        for _ in 0..rounds {
            crowd.join(people + 1);
            let mut last = crowd.people.pop().expect("one has joined");
            last.write_all(b"QUIT\n").expect("takes a line");
            crowd.buffer.resize(1 << 16, 0);
            while read(&mut last, &mut crowd.buffer) > 0 {}
            bytes += crowd.fence();
        }
    });
    // The fences are two PONGs to each, twice; what is left is compared with as many writes.
    let fences = 2 * rounds * people;
    let writes = 2 * rounds * people;
    row(
        format!("join and leave, room of {people}, and two PINGs from each"),
        format!(
            "{:.2} × a floor write for each who is told",
            micros(spent.server, writes + fences) / micros(floor_write, 1)
        ),
        format!(
            "{:.2} ms and {} bytes for each join and leave; {}",
            micros(spent.server, rounds) / 1e3,
            bytes / rounds,
            spent.load_share()
        ),
    );
}

/// Ten thousand come at once and go at once; and what they cost while they do nothing.
fn storm(floor_write: Duration) {
    let people = 10_000;
    let mut crowd = Crowd::gather(0);
    let empty = crowd.server.memory();
    let id = crowd.server.child.id();
    let mut bytes = 0;
    let arriving = Spent::during(id, || {
        crowd.join(people);
        bytes = crowd.fence();
    });
    let told = people * people / 2;
    row(
        format!("storm of {people} joins"),
        format!(
            "{:.3} × a floor write for each JOINED delivered",
            micros(arriving.server, told) / micros(floor_write, 1)
        ),
        format!(
            "{:.2} s, {:.0} MB; server {:.2} s; {}",
            arriving.wall.as_secs_f64(),
            bytes as f64 / 1e6,
            arriving.server.as_secs_f64(),
            arriving.load_share()
        ),
    );
    let each = (crowd.server.memory().saturating_sub(empty)) / people;
    let idle = Spent::during(id, || std::thread::sleep(Duration::from_secs(10))); // nothing is to happen
    row(
        format!("{people} people who do nothing"),
        format!("{:.2} × 400 bytes each", each as f64 / 400.0),
        format!(
            "{each} bytes each; {:.1} ms of processor in 10 s",
            idle.server.as_secs_f64() * 1e3
        ),
    );
    let mut observer = crowd.people.swap_remove(0);
    let leaving = Spent::during(id, || {
        crowd.people.clear();
        let mut left = 0;
        let mut received = Vec::new();
        while left < people - 1 {
            crowd.buffer.resize(1 << 16, 0);
            let length = read(&mut observer, &mut crowd.buffer);
            assert!(length > 0, "the server ended a connection");
            received.extend(&crowd.buffer[..length]);
            let end = received.iter().rposition(|&byte| byte == b'\n').map_or(0, |at| at + 1);
            let lines: Vec<u8> = received.drain(..end).collect();
            left +=
                lines.split(|&byte| byte == b'\n').filter(|it| it.starts_with(b"LEFT ")).count();
        }
    });
    row(
        format!("all but one of {people} disconnect at once"),
        format!(
            "{:.2} × a floor write for each who leaves",
            micros(leaving.server, people) / micros(floor_write, 1)
        ),
        format!(
            "{:.2} s; server {:.2} s",
            leaving.wall.as_secs_f64(),
            leaving.server.as_secs_f64()
        ),
    );
}

fn start() {
    let program = env!("CARGO_BIN_EXE_linechat-server");
    let times = (0..11).map(|_| {
        let begun = Instant::now();
        let server = Server::start(&[]).expect("the server starts");
        let _socket = TcpStream::connect(&server.address).expect("connects");
        begun.elapsed().as_secs_f64()
    });
    let begun = Instant::now();
    let status = Command::new("true").status().expect("runs");
    let nothing = begun.elapsed().as_secs_f64();
    assert!(status.success());
    let time = median(times.collect());
    let size = std::fs::metadata(program).map_or(0, |file| file.len());
    row(
        "from exec to the first connection",
        format!("{:.1} × running true(1)", time / nothing),
        format!("{:.2} ms; the binary has {} KB", time * 1e3, size / 1000),
    );
}

fn main() -> ExitCode {
    let arguments: Vec<_> = std::env::args().collect();
    if let [_, command, count] = arguments.as_slice() {
        if command == "floor" {
            return match floor(count.parse().unwrap_or(0)) {
                Ok(()) => ExitCode::SUCCESS,
                Err(_) => ExitCode::FAILURE,
            };
        }
    }
    if can_pin() && std::env::var_os(PINNED).is_none() {
        let this = std::env::current_exe().expect("this program");
        let mut command = Command::new("taskset");
        let status = command.args(["-c", LOAD_ON]).arg(this).env(PINNED, "1").status();
        return match status {
            Ok(status) if status.success() => ExitCode::SUCCESS,
            Ok(_) => ExitCode::FAILURE,
            Err(error) => {
                eprintln!("bench: cannot run taskset (Debian's util-linux): {error}");
                ExitCode::FAILURE
            }
        };
    }
    if descriptor_limit() < 12_000 {
        eprintln!("bench: 12 200 open files are needed; raise the limit with ulimit -n");
        return ExitCode::FAILURE;
    }
    println!("| what | ratio | figures |\n|---|---|---|");
    let mut in_a_hundred = 0.0;
    let mut floor_write = Duration::ZERO;
    for people in [10, 100, 1000, 10_000] {
        let mut crowd = Crowd::gather(people);
        floor_write = fan_out(&mut crowd);
        if people >= 100 {
            let cost = whispers(&mut crowd, floor_write, in_a_hundred);
            if people == 100 {
                in_a_hundred = cost;
            }
            joins(&mut crowd, floor_write);
        }
    }
    latency();
    storm(floor_write);
    start();
    ExitCode::SUCCESS
}
