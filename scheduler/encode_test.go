// SPDX-License-Identifier: Apache-2.0

package scheduler_test

import (
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/baton-epp/baton/inference"
	"github.com/baton-epp/baton/internal/pooltest"
	"github.com/baton-epp/baton/pool"
	"github.com/baton-epp/baton/scheduler"
)

const (
	encoding     = `{type: disagg-profile-handler, parameters: {deciders: {prefill: always-disagg-pd-decider, encode: always-disagg-multimodal-decider}}}`
	noConnectors = "no encoder connector is configured (disaggregation.ecConnector)"
)

// withImage is a request with one media part, from a caller that can encode.
func withImage(snap *pool.Snapshot) *scheduler.Query {
	q := query(snap, "x")
	q.Encodes = true
	q.Request.Media = []inference.Media{{Kind: inference.ImageURL, Span: inference.Span{Start: 0, End: 1}}}
	return q
}

// of makes a pool of one endpoint for each role, called by role and number.
func of(roles ...string) *pool.Snapshot {
	builders := make([]*pooltest.Builder, len(roles))
	for i, role := range roles {
		b := pooltest.E(fmt.Sprintf("%s-%d", role, i))
		if role != "any" {
			b.Role(role)
		}
		builders[i] = b
	}
	return pooltest.Snapshot(builders...)
}

// TestShapes: which phases run follows from the roles in the pool.
func TestShapes(t *testing.T) {
	s := load(t, twoProfiles(encoding))
	f := func(shape, wantEncode, wantPrefill, wantDecode string, wanted bool, roles ...string) {
		t.Helper()
		d, err := s.Schedule(withImage(of(roles...)))
		if err != nil {
			t.Fatalf("%s: %v", shape, err)
		}
		defer d.Release()
		encode := d.Phase(scheduler.PhaseEncode)
		got := []string{names(encode), names(d.Phase(scheduler.PhasePrefill)), names(d.Phase(scheduler.PhaseDecode))}
		if diff := cmp.Diff([]string{wantEncode, wantPrefill, wantDecode}, got); diff != "" {
			t.Errorf("%s: %s", shape, diff)
		}
		if encode.Run != (wantEncode != "") || encode.Wanted != wanted {
			t.Errorf("%s: encode runs %v, wanted %v: %s", shape, encode.Run, encode.Wanted, encode.Reason)
		}
	}
	f("E/P/D", "encode-0", "prefill-1", "decode-2", false, "encode", "prefill", "decode")
	f("E/PD", "encode-0", "", "both-1", false, "encode", "both")
	f("E/PD without labels", "encode-0", "", "any-1", false, "encode", "any")
	f("EP/D", "encode-prefill-0", "encode-prefill-0", "decode-1", false, "encode-prefill", "decode")
	f("E/PD in one", "encode-prefill-decode-0", "", "encode-prefill-decode-0", false, "encode-prefill-decode")
	f("P/D", "", "prefill-0", "decode-1", true, "prefill", "decode")
	f("aggregated", "", "", "any-0", true, "any")
}

// TestEncodeRanksAll: items are spread over every encoder there is, 64 at most, and none of them is reserved.
func TestEncodeRanksAll(t *testing.T) {
	s := load(t, twoProfiles(encoding))
	f := func(encoders, want int) {
		t.Helper()
		roles := append(slices.Repeat([]string{"encode"}, encoders), "prefill", "decode")
		q := withImage(of(roles...))
		q.Rank, q.Reserve = 2, true
		d, err := s.Schedule(q)
		if err != nil {
			t.Fatal(err)
		}
		defer d.Release()
		encode := d.Phase(scheduler.PhaseEncode)
		if len(encode.Ranked) != want || encode.Reason != "media" {
			t.Errorf("%d of %d encoders ranked (%s), want %d", len(encode.Ranked), encoders, encode.Reason, want)
		}
		if encode.Reservation != nil {
			t.Error("encode is reserved before it is known which endpoint gets which item")
		}
		d.Phase(scheduler.PhasePrefill).Reservation.Release()
		d.Phase(scheduler.PhaseDecode).Reservation.Release()
		for _, e := range q.Snapshot.Endpoints {
			if n := e.Load.Requests(); n != 0 {
				t.Errorf("%s keeps %d reservations", e.Name, n)
			}
		}
	}
	f(1, 1)
	f(5, 5)
	f(70, scheduler.MaxEncoders)
}

// TestEncodeWithoutConnector: llm-d's files with an encode decider load; where nobody can encode, start-up says so, and
// so does each decision.
func TestEncodeWithoutConnector(t *testing.T) {
	f := func(section, warning string) {
		t.Helper()
		s := load(t, twoProfiles(encoding)+section)
		if got := strings.Join(s.Warnings(), "\n"); got != warning {
			t.Errorf("%s: warnings %q, want %q", section, got, warning)
		}
	}
	const at = "test.yaml:5: disagg-profile-handler: "
	f("", at+"the encode phase runs only for decode endpoints that have a sidecar: "+noConnectors)
	f("disaggregation: {mode: orchestrate}", at+"the encode phase never runs: "+noConnectors)
	f("disaggregation: {mode: headers}", "")
	f("disaggregation: {mode: off}", "")
	f("disaggregation: {mode: orchestrate, ecConnector: ec-example}", "")

	q := withImage(of("encode", "prefill", "decode"))
	q.Encodes = false
	d, err := load(t, twoProfiles(encoding)).Schedule(q)
	if err != nil {
		t.Fatal(err)
	}
	defer d.Release()
	if e := d.Phase(scheduler.PhaseEncode); e.Run || e.Wanted || len(e.Ranked) > 0 || e.Reason != noConnectors {
		t.Errorf("%+v", e)
	}
}
