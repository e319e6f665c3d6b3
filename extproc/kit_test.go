// SPDX-License-Identifier: Apache-2.0

package extproc

import (
	"bytes"
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"slices"
	"sync/atomic"
	"testing"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	procv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/ext_proc/v3"
	extprocv3 "github.com/envoyproxy/go-control-plane/envoy/service/ext_proc/v3"
	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/protobuf/types/known/structpb"

	"github.com/baton-epp/baton/admission"
	"github.com/baton-epp/baton/config"
	"github.com/baton-epp/baton/director"
	"github.com/baton-epp/baton/filters"
	"github.com/baton-epp/baton/pickers"
	"github.com/baton-epp/baton/pool"
	"github.com/baton-epp/baton/scheduler"
	"github.com/baton-epp/baton/scorers"
	"github.com/baton-epp/baton/sidecar"
)

// kit is a server with real neighbours around a fixed pool, and a gRPC client.
type kit struct {
	t        *testing.T
	server   *Server
	client   extprocv3.ExternalProcessorClient
	snapshot *pool.Snapshot
	registry *prometheus.Registry
	records  chan *director.Record
	gate     *admission.Gate
	hold     atomic.Int64 // disaggregation.holdResponse, as a duration
}

type kitOptions struct {
	snapshot   *pool.Snapshot
	config     string // empty = the default profile
	maxBody    int64
	maxHeld    int64
	uninspect  bool
	noSubset   bool
	orchestrat director.Orchestrator // nil = a real one
}

func newKit(t *testing.T, o kitOptions) *kit {
	t.Helper()
	k := &kit{t: t, snapshot: o.snapshot, registry: prometheus.NewRegistry(), records: make(chan *director.Record, 100)}
	snapshot := func() *pool.Snapshot { return k.snapshot }
	c := config.Default()
	if o.config != "" {
		var err error
		if c, err = config.Load("test.yaml", []byte(o.config)); err != nil {
			t.Fatal(err)
		}
	}
	s := must(t)(scheduler.New(scheduler.Options{
		Config: c, File: "test.yaml", Metrics: k.registry, Trace: true,
		Plugins: []scheduler.Registry{scorers.Registry(), filters.Registry(), pickers.Registry()},
	})).(*scheduler.Scheduler)
	orchestrator := o.orchestrat
	if orchestrator == nil {
		own := must(t)(sidecar.New(sidecar.Options{Config: c.Disaggregation, Registerer: k.registry, Snapshot: snapshot})).(*sidecar.Orchestrator)
		t.Cleanup(own.Close)
		orchestrator = own
	}
	log := slog.New(slog.DiscardHandler)
	d := must(t)(director.New(director.Options{
		Scheduler: func() director.Scheduler { return s }, Snapshot: snapshot, Orchestrator: orchestrator, Logger: log, Registerer: k.registry,
		AllowUninspectedBodies: o.uninspect, Record: func(r *director.Record) { k.records <- r },
	})).(*director.Director)
	k.gate = must(t)(admission.New(max(o.maxHeld, 1<<30*btoi(o.maxHeld == 0)))).(*admission.Gate)
	k.server = must(t)(New(Options{
		Director: d, Gate: k.gate, MaxBodyBytes: max(o.maxBody, 64<<20*btoi(o.maxBody == 0)), OverrideTimeout: func() time.Duration { return 121 * time.Second },
		HoldResponse: func() time.Duration { return time.Duration(k.hold.Load()) },
		IgnoreSubset: o.noSubset, Logger: log, Registerer: k.registry,
	})).(*Server)
	k.serve()
	return k
}

func btoi(b bool) int64 {
	if b {
		return 1
	}
	return 0
}

func must(t *testing.T) func(v any, err error) any {
	t.Helper()
	return func(v any, err error) any {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}

func (k *kit) serve() {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		k.t.Fatal(err)
	}
	g := grpc.NewServer(k.server.ServerOptions(0, 0)...)
	extprocv3.RegisterExternalProcessorServer(g, k.server)
	go func() { _ = g.Serve(l) }()
	conn, err := grpc.NewClient(l.Addr().String(), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		k.t.Fatal(err)
	}
	k.client = extprocv3.NewExternalProcessorClient(conn)
	k.t.Cleanup(func() {
		_ = conn.Close()
		g.Stop()
	})
}

// call is one stream, driven step by step as a gateway would.
type call struct {
	t      *testing.T
	stream extprocv3.ExternalProcessor_ProcessClient
	cancel context.CancelFunc
}

func (k *kit) open() *call {
	k.t.Helper()
	ctx, cancel := context.WithTimeout(k.t.Context(), time.Minute)
	k.t.Cleanup(cancel)
	s, err := k.client.Process(ctx)
	if err != nil {
		k.t.Fatal(err)
	}
	return &call{t: k.t, stream: s, cancel: cancel}
}

func (c *call) send(m *extprocv3.ProcessingRequest) {
	c.t.Helper()
	if err := c.stream.Send(m); err != nil && !errors.Is(err, io.EOF) {
		c.t.Fatal(err)
	}
}

func (c *call) recv() *extprocv3.ProcessingResponse {
	c.t.Helper()
	m, err := c.stream.Recv()
	if err != nil {
		c.t.Fatalf("no answer: %v", err)
	}
	return m
}

// ended expects the stream's end with OK.
func (c *call) ended() {
	c.t.Helper()
	if m, err := c.stream.Recv(); !errors.Is(err, io.EOF) {
		c.t.Fatalf("want the stream's end with OK, got %v, %v", m, err)
	}
}

// modesOf is the protocol_config of a first message.
func modesOf(request, response procv3.ProcessingMode_BodySendMode) *extprocv3.ProtocolConfiguration {
	return &extprocv3.ProtocolConfiguration{RequestBodyMode: request, ResponseBodyMode: response}
}

type first struct {
	modes   *extprocv3.ProtocolConfiguration
	path    string
	method  string
	headers []string // name, value, …
	over    bool
	subset  any
}

func (f first) message(t *testing.T) *extprocv3.ProcessingRequest {
	t.Helper()
	if f.path == "" {
		f.path = "/v1/chat/completions"
	}
	if f.method == "" {
		f.method = "POST"
	}
	kv := append([]string{":method", f.method, ":path", f.path, ":authority", "models.test"}, f.headers...)
	if !slices.Contains(f.headers, "content-type") {
		kv = append(kv, "content-type", "application/json")
	}
	m := &extprocv3.ProcessingRequest{
		ProtocolConfig: f.modes,
		Request: &extprocv3.ProcessingRequest_RequestHeaders{RequestHeaders: &extprocv3.HttpHeaders{
			Headers: headerMap(kv...), EndOfStream: f.over,
		}},
	}
	if f.subset != nil {
		v, err := structpb.NewValue(f.subset)
		if err != nil {
			t.Fatal(err)
		}
		m.MetadataContext = &corev3.Metadata{FilterMetadata: map[string]*structpb.Struct{
			NamespaceSubset: {Fields: map[string]*structpb.Value{KeySubset: v}},
		}}
	}
	return m
}

func headerMap(kv ...string) *corev3.HeaderMap {
	h := &corev3.HeaderMap{}
	for i := 0; i < len(kv); i += 2 {
		h.Headers = append(h.Headers, &corev3.HeaderValue{Key: kv[i], RawValue: []byte(kv[i+1])})
	}
	return h
}

func bodyMessage(chunk []byte, over bool) *extprocv3.ProcessingRequest {
	return &extprocv3.ProcessingRequest{Request: &extprocv3.ProcessingRequest_RequestBody{RequestBody: &extprocv3.HttpBody{Body: chunk, EndOfStream: over}}}
}

func responseHeadersMessage(status, served string) *extprocv3.ProcessingRequest {
	m := &extprocv3.ProcessingRequest{Request: &extprocv3.ProcessingRequest_ResponseHeaders{ResponseHeaders: &extprocv3.HttpHeaders{
		Headers: headerMap(":status", status, "content-type", "application/json"),
	}}}
	if served != "" {
		m.MetadataContext = &corev3.Metadata{FilterMetadata: map[string]*structpb.Struct{
			NamespaceDestination: {Fields: map[string]*structpb.Value{KeyServed: structpb.NewStringValue(served)}},
		}}
	}
	return m
}

// picked is what a headers or body answer said.
type picked struct {
	header, metadata string
	set              map[string]string
	removed          []string
	body             []byte
	replaced         bool
}

func readMutation(t *testing.T, m *extprocv3.ProcessingResponse, common *extprocv3.CommonResponse) picked {
	t.Helper()
	p := picked{set: map[string]string{}, removed: common.GetHeaderMutation().GetRemoveHeaders()}
	for _, o := range common.GetHeaderMutation().GetSetHeaders() {
		if o.GetAppendAction() != corev3.HeaderValueOption_OVERWRITE_IF_EXISTS_OR_ADD {
			t.Errorf("header %s is not overwritten: %v", o.GetHeader().GetKey(), o.GetAppendAction())
		}
		p.set[o.GetHeader().GetKey()] = headerValue(o.GetHeader())
	}
	p.header = p.set[HeaderDestination]
	p.metadata = m.GetDynamicMetadata().GetFields()[NamespaceDestination].GetStructValue().GetFields()[HeaderDestination].GetStringValue()
	if body, ok := common.GetBodyMutation().GetMutation().(*extprocv3.BodyMutation_Body); ok {
		p.body, p.replaced = body.Body, true
	}
	return p
}

// duplex sends a request as a FULL_DUPLEX_STREAMED gateway does and returns the pick and the re-emitted body.
func (c *call) duplex(f first, chunks ...[]byte) (picked, []byte) {
	c.t.Helper()
	c.send(f.message(c.t))
	for i, chunk := range chunks {
		c.send(bodyMessage(chunk, i == len(chunks)-1))
	}
	answer := c.recv()
	h := answer.GetRequestHeaders()
	if h == nil {
		c.t.Fatalf("want the header answer first, got %v", answer)
	}
	p := readMutation(c.t, answer, h.GetResponse())
	if f.over {
		return p, nil
	}
	var body bytes.Buffer
	for over := false; !over; {
		s := c.recv().GetRequestBody().GetResponse().GetBodyMutation().GetStreamedResponse()
		if s == nil {
			c.t.Fatal("want a StreamedResponse")
		}
		body.Write(s.GetBody())
		over = s.GetEndOfStream()
	}
	return p, body.Bytes()
}

// refused expects an ImmediateResponse and returns it.
func (c *call) refused() *extprocv3.ImmediateResponse {
	c.t.Helper()
	m := c.recv()
	im := m.GetImmediateResponse()
	if im == nil {
		c.t.Fatalf("want an ImmediateResponse, got %v", m)
	}
	c.ended()
	return im
}
