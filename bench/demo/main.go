// SPDX-License-Identifier: Apache-2.0

// Command demo is what make demo runs: it starts model servers, Baton and Envoy, sends the requests of a real trace
// through them, shows what happens and says in the end whether all went well. It speaks to them over HTTP only, as any
// client does; the view is fed by Baton's /debug/decisions and /debug/endpoints.
//
// DEMO_SECONDS ends it by itself, DEMO_PORT_BASE moves its ports.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"time"
)

const (
	exitFailed      = 1
	exitUsage       = 2
	exitInterrupted = 130 // as shells have it
)

func main() {
	// The processes started from this thread end when it does; the main thread lives longest.
	runtime.LockOSThread()
	os.Exit(run(os.Args[1:], os.Getenv, os.Stdout, os.Stderr))
}

func run(args []string, env func(string) string, out *os.File, complaints io.Writer) int {
	o, err := parseOptions(args, env)
	if errors.Is(err, flag.ErrHelp) {
		return 0
	}
	if err != nil {
		fmt.Fprintf(complaints, "demo: %v\n", err)
		return exitUsage
	}
	trace, err := readTrace(o.Trace)
	if err != nil {
		fmt.Fprintf(complaints, "demo: %v\n", err)
		return exitUsage
	}
	d := demo{
		stack: stack{o: o, http: newHTTPClient(), super: newSupervisor(o.Dir)},
		trace: trace, out: out,
	}
	ctx, stop := untilSignal()
	err = d.play(ctx)
	stop()
	left := d.end()
	return d.report(err, left, complaints)
}

// untilSignal returns a context that ends when the user or the system wants the demo to end.
func untilSignal() (context.Context, context.CancelFunc) {
	return signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
}

// A demo is one run of it.
type demo struct {
	stack stack
	trace []record
	out   *os.File

	summary *summary // of the stream; nil when it was not sent
	cut     bool     // the user ended the stream early
}

func (d *demo) say(format string, args ...any) { fmt.Fprintf(d.out, format+"\n", args...) }

// errInterrupted means that the user ended the demo before it was over.
var errInterrupted = errors.New("interrupted")

// play runs the demo until it is over. What it started still runs when it returns.
func (d *demo) play(ctx context.Context) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	if err := d.stack.up(ctx, d.say); err != nil {
		if errors.Is(err, context.Canceled) || ctx.Err() != nil {
			return errInterrupted
		}
		return err
	}
	go func() {
		select {
		case p := <-d.stack.super.died:
			cancel(p.failure())
		case <-ctx.Done():
		}
	}()
	sum, err := d.stream(ctx)
	if err != nil {
		return err
	}
	d.summary = sum
	d.cut = ctx.Err() != nil
	if !d.cut && d.stack.o.For == 0 {
		d.linger(ctx)
	}
	// A signal is a way to end; a process that died is not.
	if cause := context.Cause(ctx); cause != nil && !isSignal(cause) {
		return cause
	}
	return nil
}

// isSignal reports whether the cause is that of signal.NotifyContext.
func isSignal(cause error) bool { return errors.Is(cause, context.Canceled) }

// stream sends the trace and shows what happens.
func (d *demo) stream(ctx context.Context) (*summary, error) {
	sum := &summary{}
	if d.stack.o.VLLM != "" {
		d.say("Comparing answers of the two servers together with those of one server alone ...")
		chats := longOnes(plan(d.trace, d.stack.o.pace(), 1))
		equal, err := d.stack.compare(ctx, chats, d.say)
		if err != nil {
			return nil, err
		}
		sum.compared, sum.equal = len(chats), equal
	}
	sum.snapshot = d.send(ctx, newTally())
	if ctx.Err() == nil {
		l, err := d.stack.settled(ctx)
		if err != nil {
			sum.trouble = append(sum.trouble, err)
		}
		sum.ledger = l
	}
	return sum, nil
}

func (d *demo) send(ctx context.Context, t *tally) snapshot {
	watching, stopWatching := context.WithCancel(ctx)
	defer stopWatching()
	w := watcher{http: d.stack.http, base: d.stack.debugURL()}
	var all sync.WaitGroup
	all.Go(func() { w.decisions(watching, t.decide) })
	all.Go(func() { w.endpoints(watching, t.pool) })
	d.say("Sending requests. To try it by hand, in another terminal:\n\n%s\n", strings.Join(d.try(), "\n"))
	all.Go(func() { show(watching, d.out, frame{Title: d.title(), Try: d.try()}, t) })

	sending, stopSending := ctx, context.CancelFunc(func() {})
	if d.stack.o.For > 0 {
		sending, stopSending = context.WithTimeout(ctx, d.stack.o.For)
	}
	defer stopSending()
	replay(ctx, sending, d.stack.client(), sequence(d.trace, d.stack.o.pace(), d.stack.o.For > 0), t.sent, t.done)
	for range 20 { // the last decisions are told when their streams are over
		if s := t.snapshot(); s.Totals.Decisions >= s.Totals.Sent || !wait(ctx, 100*time.Millisecond) {
			break
		}
	}
	stopWatching()
	all.Wait()
	return t.snapshot()
}

func (d *demo) title() string {
	servers := "simulated model servers"
	if d.stack.o.VLLM != "" {
		servers = "vLLM servers"
	}
	return fmt.Sprintf("Baton demo: Envoy on port %d, Baton, %d %s", d.stack.o.port(listenPort), len(d.stack.engines), servers)
}

// try is a request to send by hand, in lines that fit into 79 columns and are good to paste.
func (d *demo) try() []string {
	return []string{
		fmt.Sprintf(`curl %s/v1/chat/completions -H content-type:application/json -d \`, loopback(d.stack.o.port(listenPort))),
		fmt.Sprintf(`'{"model":%q,"max_tokens":20,"messages":[{"role":"user","content":"Hi"}]}'`, d.stack.o.model()),
	}
}

// linger tells how to try requests by hand and shows them, until ctx ends.
func (d *demo) linger(ctx context.Context) {
	fmt.Fprint(d.out, d.summary)
	d.say("\nAll of it is still running. Try it by hand, for example:\n")
	d.say("%s\n\nAnd why it went where it went:\n", strings.Join(d.try(), "\n"))
	d.say(`curl '%s/debug/decisions?n=1'`, d.stack.debugURL())
	d.say("\nCtrl-C ends it. Your requests:")
	w := watcher{http: d.stack.http, base: d.stack.debugURL()}
	w.decisions(ctx, func(seen decision) { d.say("  %s", line(row{ID: seen.RequestID, Decision: seen})) })
}

// end stops all processes; a further signal makes it impatient.
func (d *demo) end() (left []string) {
	ctx, stop := untilSignal()
	defer stop()
	return d.stack.super.stop(ctx)
}

// report says how it went and returns the exit code.
func (d *demo) report(err error, left []string, complaints io.Writer) int {
	if len(left) > 0 {
		defer fmt.Fprintf(complaints, "demo: something of these is still running: %v\n", left)
	}
	switch {
	case errors.Is(err, errInterrupted):
		d.say("\nEnded before it had begun.")
		return exitInterrupted
	case err != nil:
		fmt.Fprintf(complaints, "demo: %v\n", err)
		return exitFailed
	}
	sum := d.summary
	sum.left = left
	if d.cut {
		t := sum.snapshot.Totals
		d.say("\nEnded early: %d requests sent, %d answered, %d failed, %d stopped under way. Everything is stopped.", t.Sent, t.Answered, t.Failed, t.Stopped)
		if d.stack.o.For > 0 || len(left) > 0 {
			return exitInterrupted
		}
		return 0
	}
	if d.stack.o.For > 0 {
		fmt.Fprint(d.out, sum)
	}
	if problems := sum.problems(); len(problems) > 0 {
		for _, p := range problems {
			fmt.Fprintf(complaints, "demo: %s\n", p)
		}
		return exitFailed
	}
	d.say("\nAll went well. Everything is stopped.")
	return 0
}
