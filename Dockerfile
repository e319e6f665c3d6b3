FROM golang:1.26 AS build
WORKDIR /src
COPY go.mod go.sum ./
RUN go mod download
COPY . .
ARG VERSION=dev
RUN CGO_ENABLED=0 go build -trimpath -ldflags "-s -w -X main.version=${VERSION}" -o /out/baton ./cmd/baton

FROM gcr.io/distroless/static:nonroot
COPY --from=build /out/baton /baton
COPY --from=build /src/LICENSE /LICENSE
USER 65532:65532
# ext_proc, health, metrics
EXPOSE 9002 9003 9090
ENTRYPOINT ["/baton"]
