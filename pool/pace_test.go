// SPDX-License-Identifier: Apache-2.0

package pool

import (
	"math"
	"math/rand/v2"
	"sync"
	"testing"
	"testing/quick"
	"time"

	"github.com/baton-epp/baton/internal/alloctest"
)

var paceStart = time.Date(2026, 7, 1, 0, 0, 0, 0, time.UTC)

// engine is what the tests teach: a wait and a speed.
func engine(uncached int64, speed float64, wait time.Duration) time.Duration {
	return wait + time.Duration(float64(uncached)/speed*float64(time.Second))
}

func within(t *testing.T, what string, got, low, high float64) {
	t.Helper()
	if !(got >= low && got <= high) {
		t.Errorf("%s is %v, want %v to %v", what, got, low, high)
	}
}

func TestPaceKnowsNothing(t *testing.T) {
	var p Pace
	p.Prefilled(MinPaceTokens-1, time.Second) // too short to tell a speed, and without one there is no wait
	if p.TokensPerSecond() != 0 || p.Queue(time.Now()) != 0 || p.Transfer(1000) != 0 {
		t.Errorf("%v, %v, %v", p.TokensPerSecond(), p.Queue(time.Now()), p.Transfer(1000))
	}
}

func TestPaceSpeed(t *testing.T) {
	const speed = 8000.0
	taught := func() (*Pace, time.Time) {
		var p Pace
		for i := range 20 {
			p.prefilled(4000, engine(4000, speed, 0), paceStart.Add(time.Duration(i)*time.Second))
		}
		return &p, paceStart.Add(20 * time.Second)
	}
	t.Run("without a queue", func(t *testing.T) {
		p, now := taught()
		within(t, "speed", p.TokensPerSecond(), .999*speed, 1.001*speed)
		within(t, "queue", p.Queue(now).Seconds(), 0, 1e-3)
	})
	t.Run("from prefills of which nine in ten queue", func(t *testing.T) {
		var p Pace
		r := rand.New(rand.NewPCG(1, 2))
		for i := range 300 {
			tokens := 300 + r.Int64N(8000)
			p.prefilled(tokens, engine(tokens, speed, time.Duration(max(0, r.Float64()-.1)*3e9)), paceStart.Add(time.Duration(i)*100*time.Millisecond))
		}
		within(t, "speed", p.TokensPerSecond(), .85*speed, 1.01*speed)
		within(t, "queue", p.Queue(paceStart.Add(30*time.Second)).Seconds(), .5, 2)
	})
	t.Run("a burst that queues is no slow engine", func(t *testing.T) {
		p, now := taught()
		for i := range 1000 {
			p.prefilled(4000, engine(4000, speed, 2*time.Second), now.Add(time.Duration(i)*10*time.Millisecond))
		}
		within(t, "speed", p.TokensPerSecond(), .95*speed, speed)
		within(t, "queue", p.Queue(now.Add(10*time.Second)).Seconds(), 1.9, 2.05)
	})
	t.Run("an engine that became slower", func(t *testing.T) {
		p, now := taught()
		for i := range 30 * 60 {
			p.prefilled(4000, engine(4000, speed/2, 0), now.Add(time.Duration(i)*time.Second))
		}
		within(t, "speed", p.TokensPerSecond(), .5*speed, .51*speed)
	})
	t.Run("the first one after a quiet day counts in full", func(t *testing.T) {
		p, now := taught()
		p.prefilled(4000, engine(4000, speed/2, 0), now.Add(24*time.Hour))
		within(t, "speed", p.TokensPerSecond(), .499*speed, .501*speed)
	})
	t.Run("one whose tokens were cached raises it by a quarter at most", func(t *testing.T) {
		p, now := taught()
		p.prefilled(100_000, time.Millisecond, now)
		within(t, "speed", p.TokensPerSecond(), speed, 1.2501*speed)
	})
}

// TestPacePredicts: wait and speed may be told apart wrongly, their sum is the time that prefills take.
func TestPacePredicts(t *testing.T) {
	for _, wait := range []time.Duration{0, 50 * time.Millisecond, time.Second} {
		var p Pace
		r, now := rand.New(rand.NewPCG(3, 4)), paceStart
		for range 400 {
			tokens := 256 + r.Int64N(8000)
			now = now.Add(200 * time.Millisecond)
			p.prefilled(tokens, engine(tokens, 10_000, wait), now)
		}
		const tokens = 4000
		got := p.Queue(now).Seconds() + tokens/p.TokensPerSecond()
		want := engine(tokens, 10_000, wait).Seconds()
		within(t, "predicted time with "+wait.String(), got, .9*want, 1.1*want)
	}
}

func TestPaceQueueFades(t *testing.T) {
	var p Pace
	p.prefilled(10_000, time.Second, paceStart)
	p.prefilled(0, 4*time.Second, paceStart.Add(time.Hour)) // all cached: all of it was the wait
	now := paceStart.Add(time.Hour)
	for _, c := range []struct {
		after time.Duration
		want  float64
	}{{-time.Hour, 4}, {0, 4}, {10 * time.Second, 2}, {20 * time.Second, 1}, {5 * time.Minute, 0}} {
		within(t, "queue after "+c.after.String(), p.Queue(now.Add(c.after)).Seconds(), c.want-.05, c.want+.05)
	}
}

func TestPaceTransfer(t *testing.T) {
	var p Pace
	at := func(i int) time.Time { return paceStart.Add(time.Duration(i) * time.Second) }
	took := func(tokens int64) time.Duration {
		return 20*time.Millisecond + time.Duration(tokens)*10*time.Microsecond
	}
	p.received(4000, 5*time.Second, at(0)) // the handshake
	p.received(1000, took(1000), at(1))
	within(t, "transfer after the handshake", p.Transfer(1000).Seconds(), .029, .031)
	r := rand.New(rand.NewPCG(5, 6))
	for i := range 600 {
		tokens := 100 + r.Int64N(10_000)
		p.received(tokens, took(tokens), at(2+i))
	}
	p.received(4000, 5*time.Second, at(602)) // one more pair's handshake
	for _, tokens := range []int64{1000, 4000, 10_000} {
		want := took(tokens).Seconds()
		within(t, "transfer", p.Transfer(tokens).Seconds(), .6*want, 1.6*want)
	}
	if p.Transfer(8000) <= p.Transfer(1000) || p.Transfer(-1) <= 0 || p.Transfer(math.MaxInt64) > time.Hour {
		t.Errorf("%v for -1, %v for 1000, %v for 8000, %v for the most", p.Transfer(-1), p.Transfer(1000), p.Transfer(8000), p.Transfer(math.MaxInt64))
	}
}

// TestPaceKeepsNumbers: whatever engines and clocks say, what is learned stays a number in its range.
func TestPaceKeepsNumbers(t *testing.T) {
	var p Pace
	seen := func(uncached, tokens int64, took, moved time.Duration, clock int64) bool {
		now := time.UnixMilli(clock >> 16)
		p.prefilled(uncached, took, now)
		p.received(tokens, moved, now)
		p.prefilled(uncached&0xffff, took&0xffffffff, now)
		p.received(tokens&0xffff, moved&0xffffffff, now)
		speed := p.TokensPerSecond()
		return speed >= 0 && speed <= maxPaceRate && p.Queue(now) >= 0 && p.Queue(now) <= maxPaceTook &&
			p.Transfer(tokens) >= 0 && p.Queue(time.Unix(clock, 0)) >= 0
	}
	if err := quick.Check(seen, &quick.Config{MaxCount: 20_000}); err != nil {
		t.Error(err)
	}
	extremes := []int64{math.MinInt64, -1, 0, 1, MinPaceTokens, maxPaceTokens, maxPaceTokens + 1, math.MaxInt64}
	for _, n := range extremes {
		for _, d := range extremes {
			for _, c := range extremes {
				if !seen(n, n, time.Duration(d), time.Duration(d), c) {
					t.Errorf("%d tokens in %d at %d: speed %v, queue %v, transfer %v", n, d, c, p.TokensPerSecond(), p.Queue(paceStart), p.Transfer(n))
				}
			}
		}
	}
}

func TestAgedIgnoresWhatIsNoNumber(t *testing.T) {
	var a aged
	for _, v := range []float64{math.NaN(), math.Inf(1), -1, math.MaxFloat64} {
		a.change(paceStart, nil, v)
		a.change(paceStart, nil, v)
	}
	if at, v := a.load(); at != 0 || v != 0 {
		t.Errorf("%v at %d", v, at)
	}
	a.change(paceStart, nil, 2)
	a.change(paceStart, func(float64, time.Duration) float64 { return math.NaN() }, 0)
	if _, v := a.load(); v != 2 {
		t.Errorf("%v, want the 2 from before", v)
	}
}

// TestAgedAcrossItsWrap: the time of an aged number has 32 bits.
func TestAgedAcrossItsWrap(t *testing.T) {
	wrap := time.UnixMilli(6 * (1 << 32) * tick.Milliseconds())
	var a aged
	a.change(wrap.Add(-time.Second), nil, 1)
	at, _ := a.load()
	within(t, "age", since(at, wrap.Add(time.Second)).Seconds(), 1.8, 2.2)
	a.change(wrap, func(v float64, _ time.Duration) float64 { return v }, 0)
	if at, _ = a.load(); at == 0 || since(at, wrap.Add(-time.Hour)) != 0 {
		t.Errorf("set at %d", at)
	}
}

// TestPaceAtOnce is for the race detector; what is read at any moment is a number that was taught.
func TestPaceAtOnce(t *testing.T) {
	var p Pace
	var w Warm
	var wg sync.WaitGroup
	for g := range 8 {
		wg.Go(func() {
			for i := range 2000 {
				p.Prefilled(int64(1000+i), time.Duration(1+g)*100*time.Millisecond)
				p.Received(int64(1000+i), time.Duration(1+g)*10*time.Millisecond)
				if v := p.TokensPerSecond(); !(v >= 1000/.8 && v <= 3000/.1) {
					t.Errorf("speed %v", v)
				}
				if q := p.Queue(time.Now()); q < 0 || q > time.Second {
					t.Errorf("queue %v", q)
				}
				if x := p.Transfer(1000); x <= 0 || x > time.Second {
					t.Errorf("transfer %v", x)
				}
				slot := uint32(64*g + i%64)
				w.Add(slot)
				if !w.Has(slot) {
					t.Errorf("slot %d is cold", slot)
				}
				w.Forget(slot)
			}
		})
	}
	wg.Wait()
}

func TestPaceAllocations(t *testing.T) {
	var p Pace
	var w Warm
	now := time.Now()
	alloctest.AtMost(t, 0, "pace", func() {
		p.Prefilled(1000, time.Second)
		p.Received(1000, time.Second)
		_, _, _ = p.TokensPerSecond(), p.Queue(now), p.Transfer(1000)
		w.Add(7)
		w.Forget(7)
	})
}
