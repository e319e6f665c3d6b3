// SPDX-License-Identifier: Apache-2.0

package pool

import (
	"testing"
	"time"
)

func TestReservationIsReleasedOnce(t *testing.T) {
	var l Load
	r := l.Reserve(10)
	r.ReleaseTokens()
	r.ReleaseTokens()
	if l.Requests() != 1 || l.Tokens() != 0 {
		t.Errorf("%d requests, %d tokens", l.Requests(), l.Tokens())
	}
	r.Release()
	r.Release()
	r.Expire(time.Now(), time.Second)
	(*Reservation)(nil).Release()
	if l.Requests() != 0 || l.Tokens() != 0 || l.Started() != 1 {
		t.Errorf("%d requests, %d tokens, %d started", l.Requests(), l.Tokens(), l.Started())
	}
}

func TestEstimateEnds(t *testing.T) { // docs/design.md 5.1, third row
	now := time.Now()
	for _, c := range []struct {
		name    string
		life    time.Duration
		scrapes []bool
		after   time.Duration
		want    int64
	}{
		{"one scrape", 0, []bool{true}, 0, 1},
		{"second scrape", 0, []bool{true, true}, 0, 0},
		{"clock ticks are no scrapes", 0, []bool{false, false, false}, 0, 1},
		{"its predicted end", 3 * time.Second, []bool{false}, 4 * time.Second, 0},
		{"sixty seconds at most", time.Hour, []bool{false}, 61 * time.Second, 0},
	} {
		t.Run(c.name, func(t *testing.T) {
			var l Load
			l.Reserve(1).Expire(now, c.life)
			for _, scraped := range c.scrapes {
				l.ScrapeBegins(now.Add(c.after), scraped)
			}
			if l.Requests() != c.want {
				t.Errorf("%d requests, want %d", l.Requests(), c.want)
			}
		})
	}
}

// TestRequestsOnTheirWayAreNotForgotten: a scrape that begins right after a burst cannot show it yet.
func TestRequestsOnTheirWayAreNotForgotten(t *testing.T) {
	var l Load
	now := time.Now()
	if got := l.Settled(now); got != 0 {
		t.Fatalf("before anything: %d", got)
	}
	for range 5 {
		l.Reserve(1)
	}
	at := func(after time.Duration) int64 {
		m := Metrics{Started: l.Settled(now.Add(after))}
		return l.SinceScrape(&m)
	}
	if got := at(10 * time.Millisecond); got != 5 {
		t.Errorf("10 ms after the burst %d count, want 5", got)
	}
	if got := at(150 * time.Millisecond); got != 5 {
		t.Errorf("150 ms after the burst %d count, want 5", got)
	}
	if got := at(400 * time.Millisecond); got != 0 {
		t.Errorf("400 ms after the burst %d count, want 0: the scrape shows them", got)
	}
	for i := range 1000 {
		l.Settled(now.Add(time.Second + time.Duration(i)*time.Millisecond))
	}
	if len(l.marks) > maxMarks {
		t.Errorf("%d marks kept", len(l.marks))
	}
}

func TestEjectionDoublesAndHalfOpens(t *testing.T) { // docs/design.md 5.2
	var h Health
	now := time.Now()
	for i := range EjectAfter {
		if h.Standing(now) != Healthy {
			t.Fatalf("ejected after %d failures", i)
		}
		h.Fail(now)
	}
	if h.Standing(now) != Ejected || h.Standing(now.Add(EjectFor-1)) != Ejected {
		t.Error("not ejected for ten seconds")
	}
	now = now.Add(EjectFor)
	if h.Standing(now) != Probation || !h.TryProbe(now) || h.TryProbe(now) || h.Standing(now) != Ejected {
		t.Error("want one probe at a time")
	}
	h.Fail(now)
	if h.Standing(now.Add(2*EjectFor-1)) != Ejected || h.Standing(now.Add(2*EjectFor)) != Probation {
		t.Error("the second ejection does not double")
	}
	h.Succeed()
	if h.Standing(now) != Healthy || !h.EjectedUntil().IsZero() {
		t.Error("a success does not end it")
	}
	for range 20 {
		now = h.EjectedUntil().Add(time.Second)
		for range EjectAfter {
			h.Fail(now)
		}
	}
	if out := h.EjectedUntil().Sub(now); out > EjectMax {
		t.Errorf("ejected for %v, at most %v", out, EjectMax)
	}
}
