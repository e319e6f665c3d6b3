// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"strings"
	"sync/atomic"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	procv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/ext_proc/v3"
	extprocv3 "github.com/envoyproxy/go-control-plane/envoy/service/ext_proc/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/health"
	"google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/structpb"
)

const (
	headerDestination    = "x-gateway-destination-endpoint"
	namespaceDestination = "envoy.lb"
	keyServed            = "x-gateway-destination-endpoint-served"

	modeDuplex = procv3.ProcessingMode_FULL_DUPLEX_STREAMED
	modeNone   = procv3.ProcessingMode_NONE
)

// listening is what a server says on its first line.
type listening struct {
	Addr string `json:"addr"`
}

// floorCommand serves the floor until standard input ends.
func floorCommand(ctx context.Context, args []string, stdin io.Reader, stdout io.Writer) error {
	fs := flag.NewFlagSet("bench floor", flag.ContinueOnError)
	listen := fs.String("listen", "127.0.0.1:0", "`address` of the ext_proc server")
	endpoints := fs.String("endpoints", "127.0.0.1:8000", "comma-separated `list` of endpoints to answer in turn")
	if err := fs.Parse(args); err != nil {
		return err
	}
	ctx, cancel := untilEOF(ctx, stdin)
	defer cancel()
	ln, err := new(net.ListenConfig).Listen(ctx, "tcp", *listen)
	if err != nil {
		return fmt.Errorf("floor: %w", err)
	}
	server := newFloor(strings.Split(*endpoints, ","))
	defer context.AfterFunc(ctx, server.Stop)()
	if err := writeLine(stdout, listening{Addr: ln.Addr().String()}); err != nil {
		return err
	}
	return server.Serve(ln)
}

// newFloor is a gRPC server with the sizes, windows and keepalive that Baton has: what a careful author sets.
func newFloor(endpoints []string) *grpc.Server {
	const maxMessage = 65 << 20
	s := grpc.NewServer(
		grpc.MaxRecvMsgSize(maxMessage), grpc.MaxSendMsgSize(maxMessage), grpc.MaxConcurrentStreams(1<<20),
		grpc.InitialWindowSize(1<<20), grpc.InitialConnWindowSize(16<<20),
		grpc.KeepaliveParams(keepalive.ServerParameters{Time: 30 * time.Second, Timeout: 20 * time.Second}),
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: 5 * time.Second, PermitWithoutStream: true}),
	)
	extprocv3.RegisterExternalProcessorServer(s, &floor{endpoints: endpoints})
	grpc_health_v1.RegisterHealthServer(s, health.NewServer())
	return s
}

// floor is the least that answers as a picker must: it holds the request body, names the next endpoint of a list, gives
// the body back as it came, and echoes the response. It parses, counts and limits nothing.
type floor struct {
	extprocv3.UnimplementedExternalProcessorServer
	endpoints []string
	next      atomic.Uint64
}

// Process handles one HTTP request.
func (f *floor) Process(s extprocv3.ExternalProcessor_ProcessServer) error {
	first, err := s.Recv()
	if err != nil {
		return ended(err)
	}
	headers := first.GetRequestHeaders()
	if headers == nil || first.GetProtocolConfig().GetRequestBodyMode() != modeDuplex {
		return status.Error(codes.Unimplemented, "the floor knows FULL_DUPLEX_STREAMED requests only")
	}
	var held [][]byte
	for over := headers.GetEndOfStream(); !over; {
		msg, err := s.Recv()
		if err != nil {
			return ended(err)
		}
		body := msg.GetRequestBody()
		held, over = append(held, body.GetBody()), body.GetEndOfStream()
	}
	if err := s.Send(f.pick()); err != nil {
		return err
	}
	for i, chunk := range held {
		if err := s.Send(requestChunk(chunk, i == len(held)-1)); err != nil {
			return err
		}
	}
	return f.respond(s)
}

// respond answers the response phase until the gateway ends the stream.
func (f *floor) respond(s extprocv3.ExternalProcessor_ProcessServer) error {
	for {
		msg, err := s.Recv()
		if err != nil {
			return ended(err)
		}
		var answer *extprocv3.ProcessingResponse
		switch m := msg.GetRequest().(type) {
		case *extprocv3.ProcessingRequest_ResponseHeaders:
			answer = responseHeadersPass
		case *extprocv3.ProcessingRequest_ResponseBody:
			answer = responseChunk(m.ResponseBody.GetBody(), m.ResponseBody.GetEndOfStream())
		default:
			continue
		}
		if err := s.Send(answer); err != nil {
			return err
		}
	}
}

// ended is nil for the regular end of a stream.
func ended(err error) error {
	if errors.Is(err, io.EOF) || status.Code(err) == codes.Canceled {
		return nil
	}
	return err
}

// pick answers the request headers with the next endpoint, in header and metadata.
func (f *floor) pick() *extprocv3.ProcessingResponse {
	endpoint := f.endpoints[f.next.Add(1)%uint64(len(f.endpoints))]
	namespace := &structpb.Struct{Fields: map[string]*structpb.Value{headerDestination: structpb.NewStringValue(endpoint)}}
	return &extprocv3.ProcessingResponse{
		Response: &extprocv3.ProcessingResponse_RequestHeaders{RequestHeaders: &extprocv3.HeadersResponse{
			Response: &extprocv3.CommonResponse{HeaderMutation: &extprocv3.HeaderMutation{
				SetHeaders: []*corev3.HeaderValueOption{{
					Header:       &corev3.HeaderValue{Key: headerDestination, RawValue: []byte(endpoint)},
					AppendAction: corev3.HeaderValueOption_OVERWRITE_IF_EXISTS_OR_ADD,
				}},
			}},
		}},
		DynamicMetadata: &structpb.Struct{Fields: map[string]*structpb.Value{namespaceDestination: structpb.NewStructValue(namespace)}},
	}
}

var responseHeadersPass = &extprocv3.ProcessingResponse{
	Response: &extprocv3.ProcessingResponse_ResponseHeaders{ResponseHeaders: &extprocv3.HeadersResponse{}},
}

func requestChunk(chunk []byte, last bool) *extprocv3.ProcessingResponse {
	return &extprocv3.ProcessingResponse{Response: &extprocv3.ProcessingResponse_RequestBody{RequestBody: streamed(chunk, last)}}
}

func responseChunk(chunk []byte, last bool) *extprocv3.ProcessingResponse {
	return &extprocv3.ProcessingResponse{Response: &extprocv3.ProcessingResponse_ResponseBody{ResponseBody: streamed(chunk, last)}}
}

func streamed(chunk []byte, last bool) *extprocv3.BodyResponse {
	return &extprocv3.BodyResponse{Response: &extprocv3.CommonResponse{BodyMutation: &extprocv3.BodyMutation{
		Mutation: &extprocv3.BodyMutation_StreamedResponse{StreamedResponse: &extprocv3.StreamedBodyResponse{Body: chunk, EndOfStream: last}},
	}}}
}
