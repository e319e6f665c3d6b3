// SPDX-License-Identifier: Apache-2.0

package director

import (
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/baton-epp/baton/internal/pooltest"
	"github.com/baton-epp/baton/pool"
	"github.com/baton-epp/baton/scheduler"
	"github.com/baton-epp/baton/sidecar"
)

// TestRecordOfEncode: a record names who encoded, or why nobody did, and keeps the phases' times apart.
func TestRecordOfEncode(t *testing.T) {
	e := pooltest.Snapshot(pooltest.E("e0"), pooltest.E("e1"), pooltest.E("p0")).Endpoints
	out := &sidecar.Outcome{
		Encoders: e[:2], Prefiller: e[2], EncodeTime: time.Second,
		Attempts: []sidecar.Attempt{
			{Phase: scheduler.PhaseEncode, Endpoint: e[0], Number: 1, Duration: time.Second},
			{Phase: scheduler.PhaseEncode, Endpoint: e[1], Number: 1, Duration: time.Second},
			{Phase: scheduler.PhasePrefill, Endpoint: e[2], Number: 1, Duration: 3 * time.Second},
		},
	}
	r := &Record{Picks: map[string]string{}, Reasons: map[string]string{"encode": "media"}}
	recordOutcome(r, &Exchange{outcome: out})
	if diff := cmp.Diff(map[string]string{"encode": "default/e0,default/e1", "prefill": "default/p0"}, r.Picks); diff != "" {
		t.Error(diff)
	}
	if len(r.Attempts) != 3 || r.Attempts[0].Phase != "encode" || r.Seconds.Encode != 1 || r.Seconds.Prefill != 3 || r.Reasons["encode"] != "media" {
		t.Errorf("%+v", r)
	}
	if r.Reasons["prefill"] != "" || r.Attempts[0].Error != "" {
		t.Errorf("%+v", r)
	}
	recordOutcome(r, &Exchange{outcome: &sidecar.Outcome{EncodeReason: "the decode endpoint encodes by itself"}})
	if r.Reasons["encode"] != "the decode endpoint encodes by itself" {
		t.Errorf("reasons %v", r.Reasons)
	}
}

// TestRecordOfPrefillNotHad: a record keeps what the decider said beside what kept the prefill from running, and what
// broke attempts.
func TestRecordOfPrefillNotHad(t *testing.T) {
	e := pooltest.Snapshot(pooltest.E("p0")).Endpoints[0]
	for had, want := range map[string]string{"": "n > 1", "always": "always; n > 1"} {
		r := &Record{Picks: map[string]string{}, Reasons: map[string]string{}}
		if had != "" {
			r.Reasons["prefill"] = had
		}
		recordOutcome(r, &Exchange{outcome: &sidecar.Outcome{
			WayReason: "n > 1", Attempts: []sidecar.Attempt{{Phase: scheduler.PhasePrefill, Endpoint: e, Error: "connection refused"}},
		}})
		if r.Reasons["prefill"] != want || r.Attempts[0].Error != "connection refused" {
			t.Errorf("%+v, want %q", r, want)
		}
	}
}

// TestEjectionsCount in one metric, whoever noticed.
func TestEjectionsCount(t *testing.T) {
	o := &scripted{}
	b := newBench(t, o)
	b.d.Ejected(b.snapshot.Endpoints[0], "refused")
	for range pool.EjectAfter + 1 {
		x, _, err := b.run(t)
		if err != nil {
			t.Fatal(err)
		}
		x.ResponseHeaders(t.Context(), time.Now(), 503, b.snapshot.Endpoints[1].Hostport, false)
		x.Done(EndSeen)
	}
	if n := testutil.ToFloat64(b.d.metrics.ejections); n != 2 {
		t.Errorf("%v ejections counted, want 2", n)
	}
}
